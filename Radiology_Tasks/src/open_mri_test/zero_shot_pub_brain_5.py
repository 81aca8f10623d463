#!/usr/bin/env python3
"""Zero-shot classification on Pub-Brain-5 (see --help)."""

from itemizedclip_radiology.benchmarks.pub_brain_5 import PubBrain5Options

from itemizedclip.evaluation.benchmark import evaluate_from_flags

if __name__ == "__main__":
    evaluate_from_flags(PubBrain5Options, prog="zero_shot_pub_brain_5.py")
