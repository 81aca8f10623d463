#!/usr/bin/env python3
"""Zero-shot detection of 16 findings on CT-RATE (see --help)."""

from itemizedclip_radiology.benchmarks.chest_ct import CtRateOptions

from itemizedclip.evaluation.benchmark import evaluate_from_flags

if __name__ == "__main__":
    evaluate_from_flags(CtRateOptions, prog="zeroshot_ct_rate.py")
