"""Images and studies with attention planted at known places, to make reports of without a model."""

from __future__ import annotations

import numpy as np
import torch

from itemizedclip.evaluation.attention import ItemMaps
from itemizedclip.viewer.explanation import Explanation
from itemizedclip.viewer.geometry import Geometry
from itemizedclip.viewer.inputs import InputView, ModelInput
from itemizedclip.viewer.page.html import Provenance

PROVENANCE = Provenance("a-model", "epoch_3.pt", "ab" * 32, [("epoch", "3")], ["a note of the model"])
AXIAL = np.array([[0.0, 0, -0.8, 0], [0, -0.8, 0, 0], [3.0, 0, 0, 0], [0, 0, 0, 1]])
"""Voxel (d, h, w) → world, mm, RAS+: slices lead upwards, rows to the back, columns to the patient's left."""


def planted_maps(grid, spots, *, num_heads=2, nowhere=0.2):
    """ItemMaps of T items; item k puts half of its attention on the token spots[k], the rest evenly on all.

    Head h looks h times as hard at its spot as the average, so that heads differ.
    """
    total = int(np.prod(grid))
    weights = torch.full((len(spots), num_heads, *grid), 0.0)
    shares = torch.zeros(len(spots), num_heads)
    for k, spot in enumerate(spots):
        for head in range(num_heads):
            on_spot = 0.5 if num_heads == 1 else 0.3 + 0.4 * head / (num_heads - 1)
            shares[k, head] = nowhere * (k + 1) / len(spots)
            weights[k, head] = (1 - shares[k, head] - on_spot) / total
            weights[(k, head, *spot)] += on_spot
    return ItemMaps(weights, shares, torch.linspace(0.6, -0.1, len(spots)))


def photograph(size=(60, 80), view=(64, 64), grid=(8, 8), spots=((2, 5), (6, 1)), items=None, name="scene.png"):
    """A grey picture whose shorter side was resized to the view, the longer one cropped."""
    values = np.full((*size, 3), 90, dtype=np.uint8)
    factor = min(view) / min(size)
    resized = [round(n * factor) for n in size]
    geometry = Geometry.of_input(size).resize(resized)
    geometry = geometry.crop([(r - v) // 2 for r, v in zip(resized, view)], view)
    source = ModelInput(name, torch.zeros(3, *view), [InputView(name, values, "rgb", geometry)], notes=["a note"])
    texts = items or [f"item {k}" for k in range(len(spots))]
    return Explanation(source, texts, planted_maps(grid, spots))


def study(size=(16, 64, 64), grid=(2, 4, 4), spots=((1, 0, 2, 1), (2, 1, 1, 3)), items=None, affine=None, num_series=3):
    """Series of grey values, each with a ramp of its own, the whole of which the model saw."""
    D, H, W = size
    views = []
    for s in range(num_series):
        ramp = np.add.outer(np.arange(D) * 5, np.add.outer(np.arange(H) * 2, np.arange(W))) + 10 * s
        spacing = (3.0, 0.8, 0.8) if affine is not None else None
        values = (ramp % 256).astype(np.uint8)
        views.append(InputView(f"SERIES_{s}", values, "grey", Geometry.of_input(size), spacing, affine))
    source = ModelInput("STUDY7", torch.zeros(num_series, 1, *size), views)
    texts = items or [f"finding {k}" for k in range(len(spots))]
    return Explanation(source, texts, planted_maps((num_series, *grid), spots))


def scan(size=(12, 50, 60), view=(16, 48, 48), grid=(4, 4, 4), spots=((0, 1, 3, 0),), affine=None):
    """A CT scan in HU, tiles of 5 × 5 voxels, which the model padded along the body and cropped in plane."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(-1024, 3072, (size[0], size[1] // 5, size[2] // 5), dtype=np.int16)
    values = coarse.repeat(5, axis=1).repeat(5, axis=2)
    geometry = Geometry.of_input(size).crop([(n - v) // 2 for n, v in zip(size, view)], view)
    shown = InputView(
        "CHEST", values, "hu", geometry, (5.0, 0.7, 0.7), affine, window_hu=(-1150.0, 350.0), body="chest"
    )
    source = ModelInput("CHEST", torch.zeros(1, 1, *view), [shown])
    return Explanation(source, [f"finding {k}" for k in range(len(spots))], planted_maps((1, *grid), spots))


def head_ct(size=(12, 40, 40), grid=(4, 4, 4), spots=((1, 1, 3, 0), (3, 2, 1, 1)), affine=AXIAL, items=None):
    """A head CT, one array of HU in the model's three windows, and one MRI series."""
    generator = np.random.default_rng(1)
    hu = generator.integers(-1000, 1500, (size[0], size[1] // 5, size[2] // 5), dtype=np.int16)
    hu = hu.repeat(5, axis=1).repeat(5, axis=2)
    windows = {"Blood": (-20.0, 180.0), "Bone": (-800.0, 2000.0), "Brain": (0.0, 80.0)}
    geometry = Geometry.of_input(size)
    views = [
        InputView(f"HEAD_AX_{word}Window", hu, "hu", geometry, (3.0, 0.8, 0.8), affine, window_hu=limits, body="head")
        for word, limits in windows.items()
    ]
    other = np.full(size, 90, dtype=np.uint8)
    views.append(InputView("AX_T2_FLAIR", other, "grey", geometry, (3.0, 0.8, 0.8), affine, body="head"))
    source = ModelInput("HEAD", torch.zeros(len(views), 1, *size), views)
    texts = items or [f"finding {k}" for k in range(len(spots))]
    return Explanation(source, texts, planted_maps((len(views), *grid), spots))
