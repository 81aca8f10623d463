"""Milliseconds per query of a search in an image index: after the prefilter against exactly, at ViT-B/16 size.

    python benchmarks/search.py --threads 1                    # 10,000 images, 2 GB in a temporary folder, minutes
    python benchmarks/search.py --images 2000 --texts 1 8 64

The index holds random features of the true shape (196 tokens of 512), written and read back as `itemizedclip index`
does; the text tower has random weights. A search is everything after loading: encoding the texts, the prefilter,
exact scores, attention and boxes of the ten hits. Sides take turns in one run, the best of the turns counts; ratios are
of processor time, which other jobs of the machine change less. "Tokens projected" is the exact search by the scorer
that evaluations use, which projects the tokens of every image; it is timed on the first images alone and scaled up.
Recall says nothing about random features and is not measured here.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from itemizedclip.evaluation.tcsim import TcsimScorer, top_images
from itemizedclip.models.factory import LoadedModel, create_model, create_tokenizer, transform_spec
from itemizedclip.search.index import ImageIndex
from itemizedclip.search.store import (
    FeatureSource,
    FeatureStore,
    IndexedImage,
    Manifest,
    ShardHeader,
    write_manifest,
    write_shard,
)

SHARD_SIZE = 256
PROJECTED_IMAGES = 500
WORDS = ("a", "plane", "hangar", "lake", "red", "roof", "two", "near", "boats", "field", "road", "trees")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=positive, default=10_000)
    parser.add_argument("--texts", type=positive, nargs="+", default=[1, 10], help="queries of one search")
    parser.add_argument("--candidates", type=positive, nargs="+", default=[500, 2000], help="left by the prefilter")
    parser.add_argument("--turns", type=positive, default=2)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--folder", type=Path, help="where the index is written and removed; default: a temporary one")
    return parser.parse_args()


def write_index(folder: Path, num_images: int) -> ImageIndex:
    """An index of random features, opened."""
    model = create_model("ViT-B-16-ItemizedCLIP").eval()
    L, D = 196, model.head.width
    source = FeatureSource("0" * 64, model.config, transform_spec(model.config), "float16", "fp32")
    images = [
        IndexedImage(f"{number:06d}.jpg", 1, 1, 480, 640, number // SHARD_SIZE, number % SHARD_SIZE)
        for number in range(num_images)
    ]
    for start in range(0, num_images, SHARD_SIZE):
        own = images[start : start + SHARD_SIZE]
        global_nD = torch.randn(len(own), D)
        tokens_nLD = torch.randn(len(own), L, D) + global_nD[:, None]
        write_shard(folder, own[0].shard, global_nD.half(), tokens_nLD.half(), ShardHeader(source, own, []))
    manifest = Manifest(str(folder), "none", source, (14, 14), images)
    write_manifest(folder, manifest)
    loaded = LoadedModel(model, model.config, create_tokenizer(model.config))
    return ImageIndex(FeatureStore(folder, manifest, torch.device("cpu")), loaded)


def search_projecting(index: ImageIndex, texts: list[str]) -> None:
    """The exact search of the first images, every token projected."""
    scorer = TcsimScorer(index.loaded.model.head, index.encode(texts), normalise_tokens=False)
    numbers = range(min(PROJECTED_IMAGES, len(index)))
    top_images(scorer, index.store.chosen_batches(numbers), 10)


def best_seconds(sides: dict[str, Callable[[], object]], turns: int) -> dict[str, tuple[float, float]]:
    """Shortest wall and processor time of each side; the first turn warms up, that is reads the files into memory."""
    best = dict.fromkeys(sides, (float("inf"), float("inf")))
    for turn in range(turns + 1):
        for name, run in sides.items():
            wall, processor = time.perf_counter(), time.process_time()
            run()
            if turn:
                taken = time.perf_counter() - wall, time.process_time() - processor
                best[name] = min(best[name][0], taken[0]), min(best[name][1], taken[1])
    return best


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    table = Table(title=f"Search of {arguments.images:,} images, CPU, {arguments.threads} threads")
    for column in ("texts", "search", "ms per query", "of a processor", "ratio"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        index = write_index(Path(folder), arguments.images)
        for num_texts in arguments.texts:
            picks = torch.randint(len(WORDS), (num_texts, 4)).tolist()
            texts = [" ".join(WORDS[word] for word in words) for words in picks]
            sides: dict[str, Callable[[], object]] = {"tokens projected": partial(search_projecting, index, texts)}
            sides["exact"] = partial(index.search, texts, exact=True)
            for candidates in arguments.candidates:
                sides[f"{candidates:,} candidates"] = partial(index.search, texts, candidates=candidates)
            seconds = best_seconds(sides, arguments.turns)
            scale = len(index) / min(PROJECTED_IMAGES, len(index))
            whole = seconds["tokens projected"][1] * scale
            for name, (wall, processor) in seconds.items():
                factor = scale if name == "tokens projected" else 1.0
                numbers = [f"{1000 * factor * value / num_texts:,.0f}" for value in (wall, processor)]
                table.add_row(f"{num_texts}", name, *numbers, f"{whole / (factor * processor):.1f}×")
            table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()
