#!/usr/bin/env python3
"""Train on whole brain MRI and head CT studies (see --help)."""

from itemizedclip_radiology.recipes import main_studies as main

if __name__ == "__main__":
    main()
