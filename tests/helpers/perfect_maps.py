"""Attention that looks at one thing alone: what is brightest in the model's own input, voxel by voxel.

With one token per voxel of that input, whatever is written of such a map shows the bright thing where the writing puts
it, whichever way the input was made of a file.
"""

from __future__ import annotations

import torch

from itemizedclip.evaluation.attention import ItemMaps
from itemizedclip.viewer.explanation import Explanation
from itemizedclip.viewer.inputs import ModelInput


def perfect_explanation(opened: ModelInput, series: int = 0, text: str = "bright cube") -> Explanation:
    """One item that looks at the brightest tenth of one series' range."""
    image = opened.image[series, 0]
    weights = torch.zeros(1, 1, *opened.image[:, 0].shape)
    weights[0, 0, series] = (image > image.min() + 0.9 * (image.max() - image.min())).float()
    maps = ItemMaps(0.9 * weights / weights.sum(), torch.full((1, 1), 0.1), torch.tensor([0.1]))
    return Explanation(opened, [text], maps)
