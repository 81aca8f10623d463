#!/usr/bin/env python3
"""30-class zero-shot classification of RSICD's test split (see --help)."""

from itemizedclip_2d.benchmarks import classification_main

if __name__ == "__main__":
    classification_main()
