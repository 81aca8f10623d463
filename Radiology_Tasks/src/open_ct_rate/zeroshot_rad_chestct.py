#!/usr/bin/env python3
"""Zero-shot detection of findings on Rad-ChestCT (see --help)."""

from itemizedclip_radiology.benchmarks.zero_shot_rad_chestct import main

if __name__ == "__main__":
    main()
