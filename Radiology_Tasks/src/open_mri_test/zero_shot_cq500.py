#!/usr/bin/env python3
"""Zero-shot detection of findings on CQ500 (see --help)."""

from itemizedclip_radiology.benchmarks.zero_shot_cq500 import main

if __name__ == "__main__":
    main()
