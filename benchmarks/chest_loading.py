"""What a chest CT training step waits for its data: float32 volumes against the cache, through the trainer's loader.

    python benchmarks/chest_loading.py --output loading --workers 0 2 --step-s 2
    python benchmarks/chest_loading.py --output /mnt/nfs/loading --drop-cache      # where the volumes really lie

Writes volumes of 118×390×390 voxels in CT-RATE's layout, then reads epochs of them as training does: random crop of
112×336×336, window, normalise, collate, in loader processes, while the trainer "computes" (sleeps) --step-s seconds per
step of --batch-size × --accum-batch scans. Per source and number of workers it prints

    one process    ms to load one scan in this process
    wait           seconds that a step waits for its batch, and their share of wait + step

The files are in the page cache unless --drop-cache asks the system to forget each before it is read (Linux). The
sleep stands for a GPU: it takes no CPU, and neither do the figures count a copy to the device.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep
from typing import Literal

import numpy as np
import torch
import tyro
from itemizedclip_radiology.data.chest import ChestInput, ChestScans
from itemizedclip_radiology.data.ct_rate_tree import parse_volume_name
from itemizedclip_radiology.data.volume_cache import VolumeCache
from itemizedclip_radiology.data.volumes import CHEST_SIZE, HounsfieldWindow
from itemizedclip_radiology.models.text_tower import load_bert_tokenizer
from rich.console import Console
from rich.table import Table

from itemizedclip.data.batch import ItemCollator, ItemSample
from itemizedclip.runtime.errors import reported_errors
from itemizedclip.runtime.processes import Ranks
from itemizedclip.training.loading import MapSource
from itemizedclip.training.options import LoadingSettings

SHAPE = (118, 390, 390)
Source = Literal["float32", "float16 cache", "uint8 cache"]
SOURCES: tuple[Source, ...] = ("float32", "float16 cache", "uint8 cache")


@dataclass(frozen=True)
class Options:
    """What to measure."""

    output: Path
    """Folder for volumes and cache, on the disk to be measured; what an earlier run wrote there is used again."""

    volumes: int = 24
    """Scans; 72 MB each as float32."""

    batch_size: int = 4
    """Scans loaded together."""

    accum_batch: int = 2
    """Loaded batches per step."""

    step_s: float = 2.0
    """Seconds of a step without its data."""

    epochs: int = 2
    """Passes over the scans that are measured, after one that is not."""

    workers: tuple[int, ...] = (0, 2)
    """Numbers of loader processes to try."""

    drop_cache: bool = False
    """Before each scan is read, have the system forget its file: the disk is measured, not the page cache."""


class Forgetting(ChestScans):
    """Before a scan is read, its file is dropped from the page cache."""

    def __getitem__(self, key: int | tuple[int, int]) -> ItemSample:
        index = key[1] if isinstance(key, tuple) else key
        name = parse_volume_name(self.index[index]["recons"][0]).path
        path = self.data_root / name if self.cache is None else (self.cache.folder / name).with_suffix(".safetensors")
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
        return super().__getitem__(key)


def write_volumes(root: Path, count: int) -> Path:
    """A body of soft tissue with two lungs in air, with noise; the item file."""
    items = {}
    d, h, w = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in SHAPE), indexing="ij")
    body, lungs = (h / 0.7) ** 2 + (w / 0.9) ** 2 < 1, (h / 0.5) ** 2 + ((abs(w) - 0.4) / 0.28) ** 2 + d**4 < 0.9
    hu = np.where(lungs, -850, np.where(body, 40, -1000)).astype(np.float32)
    noise = np.random.default_rng(0)
    for number in range(1, count + 1):
        volume = parse_volume_name(f"train_{number}_a_1")
        items[volume.scan] = {"recons": [f"{volume.stem}.nii.gz"], "report": ["pleural effusion", "lung nodule"]}
        path = root / volume.path
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(torch.from_numpy(hu + 20 * noise.standard_normal(SHAPE, dtype=np.float32)), path)
    items_json = root / "itemized.json"
    items_json.write_text(json.dumps(items), encoding="utf-8")
    return items_json


def open_scans(options: Options, items_json: Path, source: Source) -> ChestScans:
    """The training scans, from the volumes or from a cache that is built first."""
    cache = None
    window = HounsfieldWindow()
    if source != "float32":
        dtype: Literal["uint8", "float16"] = "uint8" if source == "uint8 cache" else "float16"
        cache = VolumeCache(options.output / "cache", window=window, dtype=dtype)
    scans = (Forgetting if options.drop_cache else ChestScans)(
        data_root=items_json.parent, items_json=items_json, is_train=True, num_items=10, seed=0,
        options=ChestInput(window=window, size=CHEST_SIZE), cache=cache,
    )  # fmt: skip
    for index in range(len(scans)):
        ChestScans.__getitem__(scans, index)
    return scans


def waits(options: Options, scans: ChestScans, workers: int) -> Iterator[float]:
    """Seconds each step waits, while steps take --step-s, but for the first of an epoch, when workers start."""
    loading = LoadingSettings(batch_size=options.batch_size, accum_batch=options.accum_batch, workers=workers)
    collator = ItemCollator(load_bert_tokenizer("builtin", 256), 10)
    source = MapSource(scans, collator, loading, Ranks(0, 0, 1, torch.device("cpu")), seed=0)
    for epoch in range(1 + options.epochs):
        for number, step in enumerate(source.epoch(epoch, 0)):
            if epoch and number:
                yield step.wait_s
            sleep(options.step_s)


def main(argv: Sequence[str] | None = None) -> None:
    """Write volumes, load them, print."""
    options = tyro.cli(Options, args=argv, prog="chest_loading.py", description=(__doc__ or "").split("\n\n")[0])
    with reported_errors("chest_loading.py"):
        if options.volumes < 2 * options.batch_size * options.accum_batch:
            raise ValueError(f"--volumes is {options.volumes}, fewer than two steps take; give more")
        items_json = write_volumes(options.output / "volumes", options.volumes)
        where = "disk" if options.drop_cache else "page cache"
        per_step = options.batch_size * options.accum_batch
        title = f"{options.volumes} scans from {where}, {per_step} per step of {options.step_s:g} s"
        table = Table(title=title, title_justify="left")
        table.add_column("source")
        for heading in ("MB per scan", "one process", *(f"wait, {workers} workers" for workers in options.workers)):
            table.add_column(heading, justify="right")
        for source in SOURCES:
            scans = open_scans(options, items_json, source)
            folder = items_json.parent if scans.cache is None else scans.cache.folder
            files = [path for path in folder.rglob("train_*_1.*") if path.is_file()]
            started = perf_counter()
            for index in range(len(scans)):
                scans[(1, index)]
            row = [f"{1000 * (perf_counter() - started) / len(scans):.0f} ms"]
            for workers in options.workers:
                wait_s = float(np.mean(list(waits(options, scans, workers))))
                row.append(f"{wait_s:.2f} s, {100 * wait_s / (wait_s + options.step_s):.0f} %")
            megabytes = sum(path.stat().st_size for path in files) / len(files) / 1e6
            table.add_row(source, f"{megabytes:.1f}", *row)
        Console().print(table)


if __name__ == "__main__":
    main()
