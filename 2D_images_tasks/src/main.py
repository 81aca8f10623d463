#!/usr/bin/env python3
"""Train on photographs and remote-sensing images (see --help)."""

from itemizedclip_2d.recipes import main

if __name__ == "__main__":
    main()
