"""Itemized-cc0.3M and other webdataset shards as a dataset with random access: photographs with text items.

Files: tar shards (`shard_index`), and an item file {"0": ["item", …], …} keyed by the samples' index (`item_index`). A
sample that the item file lacks uses the captions of its own JSON.

Why random access. Shards are made for streaming, where the order of an epoch depends on the numbers of ranks and
workers, epochs have no exact length, a rank without a shard waits for ever, and resuming within an epoch means reading
everything before. Here an index made once (`shard_index.open_shards`) turns the shards into a dataset of N samples, an
image costs one read at a known place, and the order is a pure function of (seed, epoch): every sample once per epoch,
the same number of steps on every rank, any number of shards, ranks and workers, resuming at once.

The price is reads in random order. On a local disk, or when the shards fit into memory (0.3 million images: 10 GB),
that costs nothing. For slow network disks `window` gives nearly sequential reads: the shards are shuffled, and samples
are shuffled within `window` shards at a time, which the system is asked to read ahead as a whole.

Shards at an address (s3://, https://, …) are the same data set with the same order. Where all of them fit into the
cache of this machine, or with a window, they come in blocks that are kept; otherwise the images of a batch come in
ranges of their own, several at a time. Every image is compared with the checksum that its index holds.

Axes: N samples, n samples of an epoch, W ranks, K item slots.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from itemizedclip.data.batch import BadSampleError, ItemSample
from itemizedclip.data.images import decode_photograph
from itemizedclip.data.items import diverse_sample, sample_rng, seeded_transforms
from itemizedclip.data.preflight import PreflightError
from itemizedclip.data.sampler import EpochSampler, Key
from itemizedclip.runtime import remote
from itemizedclip.runtime.processes import stable_seed
from itemizedclip_2d.packed_items import PackedItems
from itemizedclip_2d.shard_index import SHARD_REMEDY, ShardIndex, endings_found, listed_counts, no_index

logger = logging.getLogger(__name__)

OnBadSample = Literal["skip", "stop"]

_MAX_OPEN_SHARDS = 64
_MAX_LISTED = 5
_MORE_ATTEMPTS = 3
_REPEATS = 2**20
"""Distance of the epoch numbers of repeated draws; see `ShardSampler.keys`."""


# --- samples ---------------------------------------------------------------------------------------------------------


class ShardDataset(Dataset[ItemSample]):
    """Images and text items of a set of shards.

    Training draws K texts per image, most of them several items joined (`diverse_sample`; the number joined is not
    limited to the items the image has). Evaluation gives the first K items, in order and alone, as published; unlike
    there, slots that stay empty are no texts. All random choices of a training sample follow from (seed, epoch, index).

    Attributes:
        shards: where the samples come from, in their order.
        shard_of: int64 (N,), number of the shard of each sample.
        num_bad: samples left out because they cannot be used, those of damaged shards included.
        num_fallback: samples that use their own captions because the item file has none.
    """

    def __init__(
        self,
        shards: Sequence[ShardIndex],
        *,
        transform: Callable[[Image.Image], Tensor],
        items: Mapping[int, Sequence[str]] | None,
        num_items: int,
        is_train: bool,
        seed: int,
        items_path: str | Path | None = None,
        on_bad_sample: OnBadSample = "stop",
        max_bad_fraction: float = 0.0,
        max_samples: int | None = None,
        read_ahead: bool = False,
    ) -> None:
        """Check the shards' samples and match them with their items.

        Args:
            shards: as `open_shards` returns them.
            transform: RGB image → float tensor (3, H, W).
            items: index → item list, as `load_item_lists(path, integer_keys=True)` returns it. None takes the
                samples' own captions.
            num_items: K.
            is_train: draw texts at random, or give the first K items.
            seed: of the draws.
            items_path: where `items` come from, for messages.
            on_bad_sample: "stop" raises for the first sample that cannot be used, "skip" leaves such samples out,
                up to `max_bad_fraction` of all, and logs them.
            max_bad_fraction: in [0, 1].
            max_samples: keep the first so many usable samples; None keeps all.
            read_ahead: ask the system to read a shard as a whole when its first image is needed.

        Raises:
            PreflightError: no usable sample, more bad ones than allowed, an item file that matches no sample, or two
                samples with the same index.
        """
        self.shards = list(shards)
        self.transform = transform
        self.num_items = num_items
        self.is_train = is_train
        self.seed = seed
        self._files = _ShardFiles(self.shards, read_ahead=read_ahead)
        self._items_source = str(items_path) if items_path is not None else "the item file"
        lengths = [len(shard) for shard in self.shards]
        self.shard_of = np.repeat(np.arange(len(lengths)), lengths)
        self._row = np.concatenate([np.arange(length) for length in lengths] or [np.arange(0)])
        if items is not None:
            self._check_indices(items)
        self._items = self._match(items)
        reasons = [f"{shard.path}: {name}: {reason}" for shard in self.shards for name, reason in shard.bad]
        unusable, more_reasons = self._without_items(items)
        self._report_bad(reasons + more_reasons, on_bad_sample, max_bad_fraction)
        self._keep(np.flatnonzero(~unusable)[:max_samples])

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, key: int | Key) -> ItemSample:
        """Sample of an index, or of (epoch, index); an index alone means epoch 0.

        Raises:
            IndexError: index outside the dataset.
            BadSampleError: the image cannot be read or decoded.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image = self.image(index)
        if self.is_train:
            generator = sample_rng(self.seed, epoch, index)
            texts = diverse_sample(self._items[index], self.num_items, generator, limit_joined_to_items=False)
            with seeded_transforms(generator):
                pixels = self.transform(image)
        else:
            texts, pixels = self.items(index), self.transform(image)
        return ItemSample(sample_id=self.name(index), image=pixels, items=texts)

    def items(self, index: int) -> list[str]:
        """The first K items of an index, none joined."""
        return self._items[self._checked(index)][: self.num_items]

    def name(self, index: int) -> str:
        """<shard>/<image member>."""
        shard = self.shards[self.shard_of[self._checked(index)]]
        return f"{shard.path.name}/{shard.names[self._row[index]]}"

    def image(self, index: int) -> Image.Image:
        """Decoded RGB image of an index; raises BadSampleError when the shard holds none there any more."""
        number, row = int(self.shard_of[self._checked(index)]), int(self._row[index])
        shard = self.shards[number]
        name = f"{shard.path}: {shard.names[row]}"
        if shard.remote is not None:
            return decode_photograph(self._files.fetched(number, row), source=name)
        try:
            encoded = self._files.read(number, int(shard.starts[row]), int(shard.sizes[row]))
        except OSError as error:
            raise BadSampleError(f"{name}: cannot be read ({error.strerror or error}). {SHARD_REMEDY}") from None
        return decode_photograph(encoded, source=name)

    def prefetch(self, keys: Sequence[Key]) -> None:
        """Bring the images of a batch here, several at a time, when they lie elsewhere."""
        self._files.prefetch([(int(self.shard_of[index]), int(self._row[index])) for _, index in keys])

    @property
    def summary(self) -> str:
        """What the dataset holds, for the log."""
        parts = [f"{len(self)} images (shards: {len({shard.path for shard in self.shards})})"]
        if self.num_fallback:
            parts.append(f"their own captions instead of items from {self._items_source}: {self.num_fallback}")
        if self.num_bad:
            parts.append(f"bad and left out: {self.num_bad}")
        return "; ".join(parts)

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the data, the same on any machine: content of the shards and items used. For checkpoints."""
        parts = [[shard.digest for shard in self.shards], self._items.sha256, len(self)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _checked(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of shards with {len(self)} samples")
        return index

    def _check_indices(self, items: Mapping[int, Sequence[str]]) -> None:
        """The item file must belong to these shards, and no two samples may take each other's items."""
        different = list({shard.path: shard for shard in self.shards}.values())
        owners = np.concatenate([np.full(len(shard), i) for i, shard in enumerate(different)] or [np.arange(0)])
        indices = np.concatenate([shard.indices for shard in different] or [np.arange(0)])
        known, counts = np.unique(indices[indices >= 0], return_counts=True)
        repeated = np.flatnonzero(counts > 1)
        if len(repeated):
            index = known[repeated[0]]
            a, b = (different[owner].path for owner in owners[indices == index][:2])
            raise PreflightError(
                f"{len(repeated)} indices into {self._items_source} belong to two samples, the first, {index}, to one "
                f"of {a} and one of {b}; give the samples of one source a field index of their own, with its items "
                "under those numbers in the item file"
            )
        if len(known) and not any(int(index) in items for index in known):
            raise PreflightError(
                f"{self._items_source} has no entry for any of the {len(known)} samples (indices {known[0]} to "
                f"{known[-1]}); give the item file of these shards, or captions for the samples' own captions"
            )

    def _match(self, items: Mapping[int, Sequence[str]] | None) -> PackedItems:
        """Items of every sample; none for a sample without an index where there is an item file."""
        self.num_fallback = 0

        def lists() -> Iterator[Sequence[str]]:
            for shard in self.shards:
                for row, index in enumerate(shard.indices.tolist()):
                    if items is None:
                        yield shard.captions[row]
                    elif index < 0:
                        yield []
                    elif items.get(index):
                        yield items[index]
                    else:
                        self.num_fallback += 1
                        yield shard.captions[row]

        return PackedItems.pack(lists())

    def _without_items(self, items: Mapping[int, Sequence[str]] | None) -> tuple[np.ndarray, list[str]]:
        """bool (N,), samples without an item, and the reason of each."""
        unusable = np.diff(self._items.row_ends, prepend=0) == 0
        reasons = []
        for index in np.flatnonzero(unusable).tolist():
            shard, row = self.shards[self.shard_of[index]], self._row[index]
            reasons.append(f"{shard.path}: {shard.names[row]}: {self._why_none(shard, row, items is not None)}")
        return unusable, reasons

    def _why_none(self, shard: ShardIndex, row: int, has_item_file: bool) -> str:
        if not has_item_file:
            return "its JSON has no caption; expected at least one in the field --caption-field names"
        index = int(shard.indices[row])
        if index >= 0:
            return f"{self._items_source} has no item under key {str(index)!r} and its own JSON no caption"
        return no_index(str(shard.keys[row]))

    def _report_bad(self, reasons: list[str], on_bad_sample: OnBadSample, max_bad_fraction: float) -> None:
        lost, damages = _lost_samples(self.shards)
        self.num_bad = len(reasons) + lost
        total = len(self._row) + sum(len(shard.bad) for shard in self.shards) + lost
        if not total:
            raise PreflightError(
                f"the shards hold no sample, the first is {self.shards[0].path}: {endings_found(self.shards)}"
            )
        problems = damages + reasons
        if not problems:
            return
        listed = "\n".join(f"  {problem}" for problem in problems[:_MAX_LISTED])
        if len(problems) > _MAX_LISTED:
            listed += f"\n  and {len(problems) - _MAX_LISTED} more"
        summary = f"{self.num_bad} of {total} samples cannot be used:\n{listed}"
        if self.num_bad == total:
            raise PreflightError(f"{summary}\nNo sample is left: {endings_found(self.shards)}.")
        if on_bad_sample == "stop":
            raise PreflightError(f"{summary}\nFix the shards, or leave these out with --on-bad-sample skip.")
        if self.num_bad > max_bad_fraction * total:
            raise PreflightError(
                f"{summary}\nThat is more than --max-bad-fraction {max_bad_fraction:g} allows: fix the shards, or "
                "raise the limit."
            )
        logger.warning("%s\nThese samples are skipped.", summary)

    def _keep(self, indices: np.ndarray) -> None:
        """Reduce the dataset to some of its samples."""
        if len(indices) < len(self):
            self._items = PackedItems.pack(self._items[index] for index in indices.tolist())
            self.shard_of, self._row = self.shard_of[indices], self._row[indices]


def _lost_samples(shards: Sequence[ShardIndex]) -> tuple[int, list[str]]:
    """How many samples damaged shards lack, and what is wrong with each.

    What a shard should hold is told by sizes.json; without it, what the others hold in the median.
    """
    listed = listed_counts([shard.path for shard in shards])
    intact = [len(shard) + len(shard.bad) for shard in shards if not shard.damage]
    usual = int(np.median(intact)) if intact else 1
    lost, damages = 0, []
    for shard in {shard.path: shard for shard in shards}.values():
        found = len(shard) + len(shard.bad)
        expected = listed.get(shard.path, max(usual, found + 1) if shard.damage else found)
        if shard.damage:
            damages.append(f"{shard.path}: damaged after {found} samples ({shard.damage}). {SHARD_REMEDY}")
        elif found < expected:
            damages.append(f"{shard.path}: {found} samples, its sizes.json says {expected}. {SHARD_REMEDY}")
        lost += max(0, expected - found)
    return lost, damages


class _ShardFiles:
    """Open shards; the least recently used is closed when there are too many. Pickles without its open files.

    Reads at a place (`pread`) leave no position behind that forked loader processes could disturb.
    """

    def __init__(self, shards: Sequence[ShardIndex], *, read_ahead: bool) -> None:
        self._shards = list(shards)
        self._read_ahead = read_ahead
        self._open: OrderedDict[int, int] = OrderedDict()
        self._begun: OrderedDict[int, None] = OrderedDict()
        self._fetched: dict[tuple[int, int], bytes] = {}
        sizes = {shard.path: shard.remote.size for shard in shards if shard.remote is not None}
        self._keeps_blocks = bool(sizes) and (read_ahead or sum(sizes.values()) <= remote.cache().limit)
        if sizes:
            logger.info(
                "Shards elsewhere: %.1f GB, %s", sum(sizes.values()) / 1e9,
                f"kept in {remote.cache().folder} (at most {remote.cache().limit / 1e9:g} GB)" if self._keeps_blocks
                else f"more than the cache may hold ({remote.cache().limit / 1e9:g} GB): each image comes anew every "
                f"epoch; {remote.cache_remedy()}, or read sequentially with --shard-window",
            )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_begun": OrderedDict(), "_fetched": {}}

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def read(self, number: int, start: int, size: int) -> bytes:
        """`size` bytes of shard `number` from byte `start`; fewer when the file has become shorter."""
        return os.pread(self._descriptor(number), size, start)

    def fetched(self, number: int, row: int) -> bytes:
        """An image of a shard elsewhere, checked.

        Raises:
            BadSampleError: it no longer has the checksum of its index.
            RemoteError: the store does not answer.
        """
        shard = self._shards[number]
        assert shard.remote is not None
        content = self._fetched.pop((number, row), None)
        start, size, crc = int(shard.starts[row]), int(shard.sizes[row]), int(shard.crcs[row])
        if content is None:
            content = self._blocks(number, start, size) if self._keeps_blocks else shard.remote.fetch(start, size)
        if zlib.crc32(content) != crc:
            logger.debug("%s: %s came damaged, fetched again", shard.path, shard.names[row])
            if self._keeps_blocks:
                content = shard.remote.read(start, size, again=True)
            else:
                content = shard.remote.fetch(start, size)
        for _ in range(_MORE_ATTEMPTS):
            if zlib.crc32(content) == crc:
                return content
            content = shard.remote.fetch(start, size)
        raise BadSampleError(
            f"{shard.path}: {shard.names[row]}: is not what it was when its index was made (CRC-32). {SHARD_REMEDY}"
        )

    def prefetch(self, places: Sequence[tuple[int, int]]) -> None:
        """Images (shard, row) that are asked for next."""
        wanted = [place for place in dict.fromkeys(places) if self._shards[place[0]].remote is not None]
        self._fetched.clear()  # what an earlier batch did not use
        ranges = []
        for number, row in wanted:
            shard = self._shards[number]
            assert shard.remote is not None
            ranges.append((shard.remote, int(shard.starts[row]), int(shard.sizes[row])))
        if not self._keeps_blocks:
            self._fetched.update(zip(wanted, remote.fetch_many(ranges)))
        elif not self._read_ahead:
            for file, start, size in ranges:
                file.read_ahead(start, size)

    def _blocks(self, number: int, start: int, size: int) -> bytes:
        file = self._shards[number].remote
        assert file is not None
        if self._read_ahead and number not in self._begun:
            self._begun[number] = None
            if len(self._begun) > _MAX_OPEN_SHARDS:
                self._begun.popitem(last=False)
            file.read_ahead()
        return file.read(start, size)

    def _descriptor(self, number: int) -> int:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        if len(self._open) >= _MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        descriptor = os.open(cast(Path, self._shards[number].path), os.O_RDONLY)
        if self._read_ahead and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        self._open[number] = descriptor
        return descriptor


# --- order -----------------------------------------------------------------------------------------------------------


class ShardSampler(EpochSampler):
    """Training order of shards: a pure function of (seed, epoch), whatever the numbers of ranks and workers.

    Passes over the N samples, each in an order of its own, follow one another; an epoch is the next n samples of
    them. With n = N an epoch is one pass; with n < N the epochs go on where the last one ended, so every sample is seen
    equally often; with n > N an epoch holds more than a pass.

    Args:
        shard_of: int64 (N,), shard of each sample.
        batch_size, rank, world_size, seed: as for EpochSampler.
        samples_per_epoch: n; default N.
        window: shuffle the shards and then the samples of so many shards at a time; 0 shuffles all samples at once.
        resampled: draw n samples with replacement instead.

    Raises:
        PreflightError: n is smaller than one step.
    """

    def __init__(
        self,
        shard_of: np.ndarray,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        samples_per_epoch: int | None = None,
        window: int = 0,
        resampled: bool = False,
    ) -> None:
        self.shard_of = torch.as_tensor(shard_of)
        self.window = window
        self.resampled = resampled
        n = len(shard_of) if samples_per_epoch is None else samples_per_epoch
        try:
            super().__init__(n, batch_size=batch_size, rank=rank, world_size=world_size, seed=seed)
        except ValueError as error:
            raise PreflightError(f"{error} (--train-data, --train-num-samples)") from None

    def keys(self, epoch: int) -> Tensor:
        """int64 (n, 2): epoch number for the sample's random draws, and its index, in order.

        A sample that an epoch holds twice has two different epoch numbers, so that its draws differ.
        """
        if self.resampled:
            return self._resampled_keys(epoch)
        n, N = self.num_samples, len(self.shard_of)
        start, parts = epoch * n, []
        while start < (epoch + 1) * n:
            number, begin = divmod(start, N)
            end = min(N, begin + (epoch + 1) * n - start)
            indices = self.pass_order(number)[begin:end]
            parts.append(torch.stack([torch.full_like(indices, number), indices], 1))
            start += end - begin
        return torch.cat(parts)

    def order(self, epoch: int) -> Tensor:
        """int64 (n,): the samples of an epoch, in order."""
        return self.keys(epoch)[:, 1]

    def pass_order(self, number: int) -> Tensor:
        """int64 (N,): order of pass `number` over all samples."""
        generator = torch.Generator().manual_seed(stable_seed("shards", self.seed, number))
        if not self.window:
            return torch.randperm(len(self.shard_of), generator=generator)
        shards = torch.unique(self.shard_of)
        place = torch.empty(int(shards.max()) + 1, dtype=torch.int64)
        place[shards] = torch.randperm(len(shards), generator=generator)
        window_of = place[self.shard_of] // self.window
        # A stable sort of a permutation keeps its order within each window.
        shuffled = torch.randperm(len(self.shard_of), generator=generator)
        return shuffled[window_of[shuffled].argsort(stable=True)]

    def _resampled_keys(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(stable_seed("resampled", self.seed, epoch))
        indices = torch.randint(len(self.shard_of), (self.num_samples,), generator=generator)
        by_index = indices.argsort(stable=True)
        ordered = indices[by_index]
        repeats = torch.empty_like(indices)
        repeats[by_index] = torch.arange(len(indices)) - torch.searchsorted(ordered, ordered)
        return torch.stack([epoch + _REPEATS * repeats, indices], 1)

    def __iter__(self) -> Iterator[Key]:
        keys = self.keys(self.epoch)
        for step in range(self.start_step, self.steps_per_epoch):
            start = (step * self.world_size + self.rank) * self.batch_size
            yield from map(tuple, keys[start : start + self.batch_size].tolist())
