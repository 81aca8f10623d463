"""Every test runs offline, on one thread, without a display, and like a processor without bfloat16 units."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("WANDB_MODE", "offline")
# Tests compare digits: --precision auto must be float32 on every machine, in commands that they start too. Before
# PyTorch is imported.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")
