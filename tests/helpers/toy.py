"""A model, a dataset and a run small enough for any test: a few thousand parameters, 8-pixel images, 12 words.

Usable as a program, with the trainer's own flags, for tests that need real processes; several runs, one after the
other in the same processes, are separated by "+":
    python tests/toy.py --name a --epochs 2 --logs DIR + --name b --epochs 1 --logs DIR
    torchrun --standalone --nproc_per_node 2 -- tests/toy.py …
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from itemizedclip.data.batch import BadSampleError, ItemCollator, ItemSample
from itemizedclip.data.sampler import EvalShard
from itemizedclip.models import archive
from itemizedclip.models.dual_encoder import DualEncoder, ImageFeatures
from itemizedclip.models.item_attention import ItemAttention
from itemizedclip.runtime.collectives import all_reduce_sum, rank, world_size
from itemizedclip.runtime.errors import reported_errors
from itemizedclip.training import engine
from itemizedclip.training.engine import train
from itemizedclip.training.options import (
    LoadingSettings,
    LoggingSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimizerSettings,
    RunOptions,
    RunSettings,
)
from itemizedclip.training.recipes import parse_run
from itemizedclip.training.run import launch_run

WORDS = ("red", "green", "blue", "small", "large", "left", "right", "top", "bottom", "round", "square", "empty")
CONTEXT = 4
TOY_CONFIG = {"name": "toy", "embed_dim": 16, "vision_cfg": {"tower": "toy", "width": 16}, "text_cfg": {"width": 12}}


def toy_tokenizer(texts: Sequence[str]) -> Tensor:
    """int64 (N, CONTEXT): 0 pads, words count from 1, unknown words are the last id."""
    tokens = torch.zeros(len(texts), CONTEXT, dtype=torch.int64)
    for row, text in enumerate(texts):
        for column, word in enumerate(text.split()[:CONTEXT]):
            tokens[row, column] = 1 + WORDS.index(word) if word in WORDS else len(WORDS) + 1
    return tokens


class ToyImageTower(nn.Module):
    """(B, 3, 8, 8) → 16 tokens of 2 × 2 pixels, one MLP block with dropout."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 2, stride=2)
        self.norm = nn.LayerNorm(width)
        inner = 2 * width
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Dropout(dropout), nn.Linear(inner, width))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return tokens + self.mlp(self.norm(tokens))


class ToyTextTower(nn.Module):
    """(N, C) → (N, D): mean of embeddings with dropout, then a matrix."""

    def __init__(self, width: int, embed_dim: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(WORDS) + 2, width)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(width, embed_dim)

    def forward(self, tokens_NC: Tensor) -> Tensor:
        real = (tokens_NC != 0).unsqueeze(-1)
        return self.out((self.dropout(self.embedding(tokens_NC)) * real).sum(1) / real.sum(1).clamp(min=1))


class ToyModel(DualEncoder):
    """A DualEncoder of about three thousand parameters."""

    head_name = "visual_proj"

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__({**TOY_CONFIG, "dropout": dropout})
        D = TOY_CONFIG["embed_dim"]
        self.image = ToyImageTower(D, dropout)
        self.text = ToyTextTower(12, D, dropout)
        self.visual_proj = ItemAttention(D, 4)
        self.init_logit_parameters()

    def encode_image(self, images: Tensor, *, series_names: Tensor | None = None) -> ImageFeatures:
        tokens = self.image(images)
        return ImageFeatures(tokens.mean(1), tokens, (4, 4))

    def encode_text(self, tokens_NC: Tensor) -> Tensor:
        return self.text(tokens_NC)

    def image_tower(self) -> list:
        return [self.image]

    def text_tower(self) -> list:
        return [self.text]

    def blocks(self) -> list:
        return [self.image.mlp]


class ToyDataset:
    """Images whose pixels follow from their items; keys (epoch, index).

    Args:
        num_samples: N.
        bad: indices that raise BadSampleError.
        nan: indices whose image is not finite.
        wait_s: seconds each sample takes.
        hang: index of a sample that never comes.
    """

    def __init__(
        self,
        num_samples: int = 40,
        *,
        bad: Sequence[int] = (),
        nan: Sequence[int] = (),
        wait_s: float = 0.0,
        hang: int = -1,
    ):
        self.num_samples, self.bad, self.nan, self.wait_s, self.hang = num_samples, set(bad), set(nan), wait_s, hang

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, key: tuple[int, int] | int) -> ItemSample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if index in self.bad:
            raise BadSampleError(f"toy/{index}.png: truncated image; copy it again")
        time.sleep(600 if index == self.hang else self.wait_s)
        generator = torch.Generator().manual_seed(1000 * epoch + index)
        words = [int(w) for w in torch.randperm(len(WORDS), generator=generator)[: 2 + index % 3]]
        image = 0.1 * torch.randn(3, 8, 8, generator=generator)
        for word in words:
            image[word % 3, 2 * (word // 3) : 2 * (word // 3) + 2] += 1.0
        if index in self.nan:
            image[0, 0, 0] = float("nan")
        return ItemSample(f"toy-{index}", image, [WORDS[w] for w in words])


class ToyEvaluator:
    """Sum of the global features' entries over a few samples, sharded over ranks."""

    name = "toy"

    def __init__(self, dataset: ToyDataset) -> None:
        self.dataset = dataset

    def run(self, model: DualEncoder) -> dict[str, float]:
        assert not model.training
        total = torch.zeros(1, dtype=torch.float64)
        for index in EvalShard(10, rank=rank(), world_size=world_size()):
            total += model.encode_image(self.dataset[index].image[None]).global_BD.double().sum()
        return {"sum": float(all_reduce_sum(total))}


@dataclass(frozen=True)
class ToyData:
    """The toy data, and ways to disturb a run."""

    samples: int = 40
    """N."""

    bad: tuple[int, ...] = ()
    """Indices of samples that cannot be used."""

    nan: tuple[int, ...] = ()
    """Indices of samples whose image is not finite."""

    wait_s: float = 0.0
    """Seconds each sample takes to load."""

    dropout: float = 0.1
    """Of both towers."""

    kill_at: int = 0
    """Kill this process with SIGKILL when step N starts; 0: never."""

    terminate_at: int = 0
    """Send SIGTERM to this process (rank 1 of several) when step N starts; 0: never."""

    kill_in: Literal["", "write", "evaluation", "after-evaluation", "resume"] = ""
    """Kill this process with SIGKILL when that happens for the second time; "resume": the first time."""

    slow_s: float = 0.0
    """Seconds that the last rank takes longer for each step."""

    drift_at: int = 0
    """Change a weight of the last rank when step N starts; 0: never."""

    hang_at: int = 0
    """Sleep for ten minutes when step N starts; 0: never."""

    hang_sample: int = -1
    """Index of a sample that takes ten minutes to load, and hears no signal; -1: none."""


@dataclass(frozen=True)
class ToyRun(RunOptions):
    """Options of a toy run."""

    data: ToyData = field(default_factory=ToyData)


def toy_options(logs: Path | str = "logs", **changes: object) -> ToyRun:
    """Options of a two-epoch CPU run; `changes` may replace whole groups."""
    groups: dict = {
        "run": RunSettings(recipe="toy", logs=Path(logs), device="cpu"),
        "model": ModelSettings(model="toy"),
        "objective": ObjectiveSettings(ila_keep_rate=0.8),
        "optimizer": OptimizerSettings(lr=1e-2, epochs=2, warmup=2, eps=1e-8),
        "loading": LoadingSettings(batch_size=4, workers=0, num_sampled_captions=4),
        "logging": LoggingSettings(log_every_n_steps=1),
    }
    return ToyRun(**{**groups, **changes})  # type: ignore[arg-type]


def toy() -> ToyRun:
    """Two epochs on a CPU, seconds."""
    return toy_options()


def toy_train(options: ToyRun, **changes: object):
    """Train the toy model; `changes` go to `train`."""
    data = options.data
    dataset = ToyDataset(data.samples, bad=data.bad, nan=data.nan, wait_s=data.wait_s, hang=data.hang_sample)
    with launch_run(options) as ranks:
        model = ToyModel(data.dropout)
        if data.kill_at or data.terminate_at or data.hang_at or data.slow_s or data.drift_at:
            _disturb(model, data)
        _kill_in(data.kill_in)
        arguments: dict = {
            "model": model,
            "dataset": dataset,
            "collator": ItemCollator(toy_tokenizer, options.loading.num_sampled_captions),
            "evaluators": [ToyEvaluator(ToyDataset(10))],
            "transform": {},
            "data_fingerprint": f"toy-{data.samples}",
            "ranks": ranks,
        }
        return train(options, **{**arguments, **changes})


def _disturb(model: ToyModel, data: ToyData) -> None:
    """Signals and other mishaps in the forward pass of a given step."""
    steps = 0

    def before(module: nn.Module, arguments: tuple) -> None:
        nonlocal steps
        steps += module.training
        if steps == data.kill_at and module.training:
            os.kill(os.getpid(), signal.SIGKILL)
        if steps == data.terminate_at and module.training and rank() == world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        is_last = module.training and rank() == world_size() - 1
        if is_last and data.slow_s:
            time.sleep(data.slow_s)
        if is_last and steps == data.drift_at:
            with torch.no_grad():
                model.image.patches.weight[0, 0, 0, 0] += 1e-6
        if steps == data.hang_at and module.training:
            print("hanging", file=sys.stderr, flush=True)
            time.sleep(600)

    model.image.register_forward_pre_hook(before)


def _kill_in(what: str) -> None:
    """Kill this process at a moment that no step number names."""
    times = 0

    def kill_at_the(time_to_kill: int) -> None:
        nonlocal times
        times += 1
        if times == time_to_kill:
            os.kill(os.getpid(), signal.SIGKILL)

    if what == "write":
        write = archive._HashingFile.write

        def half(self, block) -> int:
            nonlocal times
            written = write(self, block)
            if self.written == 0:
                kill_at_the(2)
            self.written += written
            return written

        archive._HashingFile.written = 0
        archive._HashingFile.write = half
    elif what == "evaluation":
        run = ToyEvaluator.run
        ToyEvaluator.run = lambda self, model: (kill_at_the(2), run(self, model))[1]
    elif what == "after-evaluation":
        save = engine.save_epoch
        engine.save_epoch = lambda run, **flags: (kill_at_the(2), save(run, **flags))[1]
    elif what == "resume":
        restore = engine.restore
        engine.restore = lambda *arguments: (restore(*arguments), kill_at_the(1))[0]


def main(argv: list[str]) -> None:
    """Parse all runs, then train them in the same processes."""
    runs: list[list[str]] = [[]]
    for argument in argv:
        if argument == "+":
            runs.append([])
        else:
            runs[-1].append(argument)
    options = [parse_run({"toy": toy}, "toy", flags, prog="toy") for flags in runs]
    with reported_errors("toy"), launch_run(options[0]):
        for one in options:
            toy_train(one)


if __name__ == "__main__":
    main(sys.argv[1:])
