"""Shards read from end to end, as webdataset does it: for stores where reading at a place is slow, and for commands.

What `shards` promises is given up for it: shards are drawn with replacement, samples are shuffled within a buffer, an
epoch is a number of samples that the user names, and a run that goes on starts new streams instead of the same samples.
What remains: the same seed, epoch, step, ranks and loader processes give the same batches, every rank takes the same
number of steps, bad samples are named and counted, and no shard need be indexed, so training starts at once.

Each loader process of each rank draws shards of its own. `pipe:COMMAND` runs a command and reads its output; only a
flag can name one, never a file.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from braceexpand import braceexpand
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from itemizedclip.data.batch import BadSampleError, ItemBatch, ItemSample
from itemizedclip.data.images import decode_photograph
from itemizedclip.data.items import diverse_sample, sample_rng, seeded_transforms
from itemizedclip.data.preflight import PreflightError
from itemizedclip.data.sampler import CheckedCollator
from itemizedclip.data.workers import LOADER_TIMEOUT_S, RoomyCollator, delivered
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.flags import loader_processes
from itemizedclip.runtime.processes import Ranks, shield_loader_worker, stable_seed
from itemizedclip.runtime.registry import MissingExtraError
from itemizedclip.runtime.remote import is_address, place
from itemizedclip.training.loading import StepBatch
from itemizedclip.training.options import LoadingSettings
from itemizedclip_2d.shard_index import IMAGE_EXTENSIONS, expand_shards, no_index, parse_members

SHUFFLE_BUFFER = 1000
"""Samples of a loader process among which the next one is drawn; encoded, some 100 MB."""

MAX_FAILURES = 20
"""Shards and samples in a row that cannot be used before a run ends."""


def stream_sources(sources: str) -> list[str]:
    """What one argument names: `pipe:` commands with their braces expanded, addresses and paths.

    Raises:
        PreflightError: as `expand_shards`, or braces that do not close.
    """
    found: list[str] = []
    for source in sources.split("::"):
        if not source.strip().startswith("pipe:"):
            found += map(str, expand_shards(source))
            continue
        try:
            found += braceexpand(source.strip())
        except ValueError:
            raise PreflightError(f"shards {_shown(source)}: a brace is not closed") from None
    return found


def _shown(source: str) -> str:
    """A source for messages: of a command its first word, because others may be credentials."""
    if not source.strip().startswith("pipe:"):
        return source
    return f"pipe:{(source.strip()[5:].split() or [''])[0]} …"


@dataclass
class ShardStream(IterableDataset[tuple[ItemSample, list[str]]]):
    """Samples without end, each with the messages of the bad ones before it.

    Attributes:
        sources: what is read; see `stream_sources`.
        transform: RGB image → float tensor (3, H, W).
        items: index → item list; None takes the samples' own captions.
        num_items: K.
        seed: of all draws.
        rank: of this process.
        caption_field: JSON field of the samples' own captions.
        on_bad_sample: "stop" raises for the first sample or shard that cannot be used.
        epoch, start_step: where the stream starts; part of its seed.
    """

    sources: Sequence[str]
    transform: Callable[[Image.Image], Tensor]
    items: Mapping[int, Sequence[str]] | None
    num_items: int
    seed: int
    rank: int
    caption_field: str
    on_bad_sample: Literal["skip", "stop"] = "stop"
    epoch: int = 0
    start_step: int = 0
    _messages: list[str] = field(default_factory=list, repr=False)
    _delivered: int = field(default=0, repr=False)

    def __iter__(self) -> Iterator[tuple[ItemSample, list[str]]]:
        worker = get_worker_info()
        seed = stable_seed("stream", self.seed, self.epoch, self.start_step, self.rank, worker.id if worker else 0)
        failures = 0
        for number, sample in enumerate(self._encoded(seed)):
            try:
                ready = self._sample(sample, seed, number)
            except BadSampleError as error:
                self._bad(str(error))
                failures += 1
                if failures > MAX_FAILURES:
                    raise BadSampleError(
                        f"{failures} samples in a row cannot be used, the last: {error}. Check --train-data"
                    ) from None
                continue
            failures = 0
            messages, self._messages = self._messages, []
            yield ready, messages

    def _encoded(self, seed: int) -> Iterator[dict[str, Any]]:
        webdataset = _webdataset()

        def streams() -> Iterator[dict[str, Any]]:
            draw = random.Random(seed)  # noqa: S311  an order, no secret
            failures = 0
            while True:
                source = draw.choice(self.sources)
                before = self._delivered
                with _opened(source, webdataset) as stream:
                    yield {"url": source, "stream": stream}
                failures = failures + 1 if self._delivered == before else 0
                if failures > MAX_FAILURES:
                    raise PreflightError(
                        f"{failures} shards in a row gave no sample, the last {_shown(source)}: "
                        f"{self._messages[-1] if self._messages else 'no member <key>.json with an image'}"
                    )

        def told(error: Exception) -> bool:
            if isinstance(error, PreflightError):
                raise error
            self._bad(f"{_shown(str(getattr(error, 'args', ('', ''))[-1]))}: damaged ({type(error).__name__})")
            return True

        self._delivered = 0
        members = webdataset.tariterators.tar_file_expander(streams(), handler=told)
        grouped = webdataset.tariterators.group_by_keys(members, handler=told)

        def counted() -> Iterator[dict[str, Any]]:
            for sample in grouped:
                self._delivered += 1
                yield sample

        return webdataset.filters.shuffle(SHUFFLE_BUFFER, rng=random.Random(seed + 1))(counted())  # noqa: S311

    def _sample(self, sample: Mapping[str, Any], seed: int, number: int) -> ItemSample:
        where = f"{_shown(str(sample.get('__url__', '')))}: {sample['__key__']}"
        extension = next((name for name in IMAGE_EXTENSIONS if name in sample), "")
        try:
            key, index, captions = parse_members(sample["__key__"], extension, sample.get("json"), self.caption_field)
        except BadSampleError as error:
            raise BadSampleError(f"{where}: {error}") from None
        texts: Sequence[str] = captions
        if self.items is not None:
            if index < 0:
                raise BadSampleError(f"{where}: {no_index(key)}")
            texts = self.items.get(index) or captions
        if not texts:
            raise BadSampleError(f"{where}: no text item; expected one in the item file or under {self.caption_field}")
        image = decode_photograph(sample[extension], source=where)
        generator = sample_rng(seed, self.epoch, number)
        drawn = diverse_sample(texts, self.num_items, generator, limit_joined_to_items=False)
        with seeded_transforms(generator):
            pixels = self.transform(image)
        return ItemSample(sample_id=f"{sample['__key__']}.{extension}", image=pixels, items=drawn)

    def _bad(self, message: str) -> None:
        if self.on_bad_sample == "stop":
            raise BadSampleError(f"{message} (--on-bad-sample skip goes on without such samples)")
        self._messages.append(message)


def _opened(source: str, webdataset: Any) -> Any:
    if is_address(source):
        address = place(source)
        assert not isinstance(address, Path)
        return address.file().open()
    return webdataset.gopen(source)


def _webdataset() -> Any:
    try:
        import webdataset
    except ImportError as error:
        raise MissingExtraError("--stream needs the package webdataset: pip install -e '.[stream]'") from error
    return webdataset


class StreamSource:
    """Batches of a `ShardStream` for the engine (`training.loading.BatchSource`).

    Args:
        stream: the samples.
        collator: samples → ItemBatch.
        settings: batch sizes, workers.
        ranks: this process; its device receives the batches.
        samples_per_epoch: of all ranks together; what does not fill a step of all of them is left out.

    Raises:
        PreflightError: an epoch is smaller than a step.
        MissingExtraError: webdataset is not installed.
    """

    def __init__(
        self,
        stream: ShardStream,
        collator: Callable[[Sequence[ItemSample]], ItemBatch],
        settings: LoadingSettings,
        ranks: Ranks,
        *,
        samples_per_epoch: int,
    ) -> None:
        _webdataset()
        self.stream = stream
        self.device = ranks.device
        self.loads_per_step = settings.accum_batch * settings.accum_freq
        self.settings = settings
        self.collator = collator
        self.workers = loader_processes(settings.workers)
        self.steps_per_epoch = samples_per_epoch // (settings.step_batch * ranks.world_size)
        if not self.steps_per_epoch:
            raise PreflightError(
                f"--train-num-samples {samples_per_epoch} is less than a step of {settings.step_batch} images on each "
                f"of {ranks.world_size} ranks"
            )

    def epoch(self, epoch: int, start_step: int) -> Iterator[StepBatch]:
        """See `BatchSource`; from another `start_step` come other samples."""
        self.stream.epoch, self.stream.start_step = epoch, start_step
        loader: DataLoader[Any] = DataLoader(
            self.stream,
            batch_size=self.settings.batch_size,
            num_workers=self.workers,
            collate_fn=RoomyCollator(CheckedCollator(self.collator)),
            worker_init_fn=shield_loader_worker,
            timeout=LOADER_TIMEOUT_S if self.workers else 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator().manual_seed(self.stream.seed),
        )
        loads = delivered(loader)
        for _ in range(start_step, self.steps_per_epoch):
            started = perf_counter()
            loaded = [next(loads) for _ in range(self.loads_per_step)]
            wait_s = perf_counter() - started
            batch = ItemBatch.join([load.batch.to(self.device, non_blocking=True) for load in loaded])
            yield StepBatch(batch, wait_s, [message for load in loaded for message in load.skipped])


def stream_fingerprint(sources: Sequence[str], items_sha256: str) -> str:
    """Identity of streamed data, for checkpoints: names and items, since no content is known beforehand."""
    return hashlib.sha256(json.dumps([list(sources), items_sha256]).encode()).hexdigest()


def check_stream(stream: ShardStream) -> None:
    """Read the first sample, so that a run ends at once where nothing can be read.

    Raises:
        UserError: what is wrong, in one sentence.
    """
    try:
        next(iter(stream))
    except UserError:
        raise
    except OSError as error:
        raise PreflightError(
            f"{_shown(stream.sources[0])}: cannot be read ({type(error).__name__}); check --train-data"
        ) from None
