"""Pairs per second of TCSim scoring: the published double loop against `itemizedclip.evaluation.tcsim`.

    python benchmarks/scoring.py                      # RSICD and COCO shapes on the CPU, about a minute
    python benchmarks/scoring.py --device cuda --images 64 --texts 5000 25014

Both sides score the same random images and texts with the same head, in turns, in one run; the best of the turns
counts. The published loop runs the whole head, query projection included, for each image with all texts. What ours
computes once per evaluation, whatever the number of images, is timed apart ("once").
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from itemizedclip.evaluation.tcsim import TcsimScorer, score_images_plainly
from itemizedclip.models.dual_encoder import ImageFeatures
from itemizedclip.models.item_attention import ItemAttention


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=positive, default=4, help="images per turn")
    parser.add_argument("--texts", type=positive, nargs="+", default=[500, 1000, 2500, 5000], help="numbers of texts")
    parser.add_argument("--tokens", type=positive, default=196, help="image tokens")
    parser.add_argument("--width", type=positive, default=512, help="joint width")
    parser.add_argument("--heads", type=positive, default=8)
    parser.add_argument("--turns", type=positive, default=15)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if arguments.width % arguments.heads:
        parser.error(f"--width {arguments.width} is not divisible by --heads {arguments.heads}")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {arguments.device}: this machine has no GPU that PyTorch can use")
    return arguments


def best_seconds(sides: Mapping[str, Callable[[], Tensor]], turns: int, device: torch.device) -> dict[str, float]:
    """Shortest time of each side; they take turns, so that a busy machine slows them alike."""
    best = dict.fromkeys(sides, float("inf"))
    for turn in range(turns + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:  # the first turn warms up
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    head = ItemAttention(arguments.width, arguments.heads).to(device).eval()
    for bias in (head.attn.in_proj_bias, head.attn.out_proj.bias):
        torch.nn.init.normal_(bias, std=0.02)
    tokens_NLD = torch.randn(arguments.images, arguments.tokens, arguments.width, device=device)
    features = ImageFeatures(tokens_NLD[:, 0], tokens_NLD, (arguments.tokens,))
    table = Table(
        title=f"TCSim, {arguments.images} images of {arguments.tokens} tokens, D = {arguments.width}, "
        f"{arguments.heads} heads, {device}, {arguments.threads} threads"
    )
    for column in (
        "texts",
        "published\npairs/s",
        "ours\npairs/s",
        "ratio",
        "once\nms",
        "ours bf16\npairs/s",
        "largest\ndifference",
    ):
        table.add_column(column, justify="right")
    for num_texts in arguments.texts:
        texts_MD = torch.randn(num_texts, arguments.width, device=device)
        start = time.perf_counter()
        ours = TcsimScorer(head, texts_MD, normalise_tokens=False)
        once_ms = 1000 * (time.perf_counter() - start)
        ours_bf16 = TcsimScorer(head, texts_MD, normalise_tokens=False, dtype=torch.bfloat16)
        published = partial(score_images_plainly, head, tokens_NLD, texts_MD, normalise_tokens=False)
        difference = (published() - ours.score(features)).abs().max().item()
        sides = {
            "published": published,
            "ours": partial(ours.score, features),
            "bf16": partial(ours_bf16.score, features),
        }
        seconds = best_seconds(sides, arguments.turns, device)
        pairs = arguments.images * num_texts
        table.add_row(
            f"{num_texts:,}",
            f"{pairs / seconds['published']:,.0f}",
            f"{pairs / seconds['ours']:,.0f}",
            f"{seconds['published'] / seconds['ours']:.2f}",
            f"{once_ms:.0f}",
            f"{pairs / seconds['bf16']:,.0f}",
            f"{difference:.0e}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
