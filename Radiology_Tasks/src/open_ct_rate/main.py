#!/usr/bin/env python3
"""Train on chest CT, CT-RATE (see --help)."""

from itemizedclip_radiology.recipes import main_chest as main

if __name__ == "__main__":
    main()
