#!/usr/bin/env python3
"""Zero-shot detection of 16 findings on CT-RATE (see --help)."""

from itemizedclip_radiology.benchmarks.zero_shot_ct_rate import main

if __name__ == "__main__":
    main()
