#!/usr/bin/env python3
"""One chest CT scan, any findings (see --help)."""

from itemizedclip_radiology.viewing.inference_chest_ct import main

if __name__ == "__main__":
    main()
