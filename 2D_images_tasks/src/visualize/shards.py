#!/usr/bin/env python3
"""Attention pictures of Itemized-cc0.3M images (see --help)."""

from itemizedclip_2d.visualize_shards import main

if __name__ == "__main__":
    main()
