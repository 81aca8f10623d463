"""Preparation of radiology data: official files → the files that training and evaluation read."""
