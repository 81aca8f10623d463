#!/usr/bin/env python3
"""Zero-shot classification on Pub-Brain-5 (see --help)."""

from itemizedclip_radiology.benchmarks.zero_shot_pub_brain_5 import main

if __name__ == "__main__":
    main()
