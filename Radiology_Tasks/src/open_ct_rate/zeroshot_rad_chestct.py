#!/usr/bin/env python3
"""Zero-shot detection of findings on Rad-ChestCT (see --help)."""

from itemizedclip_radiology.benchmarks.chest_ct import RadChestCtOptions

from itemizedclip.evaluation.benchmark import evaluate_from_flags

if __name__ == "__main__":
    evaluate_from_flags(RadChestCtOptions, prog="zeroshot_rad_chestct.py")
