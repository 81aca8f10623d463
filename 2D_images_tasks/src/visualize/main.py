#!/usr/bin/env python3
"""Attention pictures of RSICD images (see --help)."""

from itemizedclip_2d.visualize_rsicd import main

if __name__ == "__main__":
    main()
