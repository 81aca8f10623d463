#!/usr/bin/env python3
"""Zero-shot detection of findings on CQ500 (see --help)."""

from itemizedclip_radiology.benchmarks.head_ct import Cq500Options

from itemizedclip.evaluation.benchmark import evaluate_from_flags

if __name__ == "__main__":
    evaluate_from_flags(Cq500Options, prog="zero_shot_cq500.py")
