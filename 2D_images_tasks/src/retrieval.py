#!/usr/bin/env python3
"""Retrieval on COCO and Flickr30k (see --help)."""

from itemizedclip_2d.benchmarks import retrieval_main

if __name__ == "__main__":
    retrieval_main()
