#!/usr/bin/env python3
"""Zero-shot detection of hemorrhage on RSNA (see --help)."""

from itemizedclip_radiology.benchmarks.head_ct import RsnaOptions

from itemizedclip.evaluation.benchmark import evaluate_from_flags

if __name__ == "__main__":
    evaluate_from_flags(RsnaOptions, prog="zero_shot_rsna.py")
