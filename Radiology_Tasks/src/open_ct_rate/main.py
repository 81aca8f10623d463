#!/usr/bin/env python3
"""Train on chest CT, CT-RATE (see --help)."""

from itemizedclip_radiology.train_chest import main

if __name__ == "__main__":
    main()
