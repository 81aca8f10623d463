#!/usr/bin/env python3
"""Zero-shot detection of hemorrhage on RSNA (see --help)."""

from itemizedclip_radiology.benchmarks.zero_shot_rsna import main

if __name__ == "__main__":
    main()
