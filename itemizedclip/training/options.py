"""The options of a training run: typed, grouped, checked, shown by --help, saved as plain data.

Flags are the field names with dashes, without the group's name; published flag names are accepted as aliases.
A domain adds its own group by subclassing `RunOptions` (which must stay constructible without arguments):

    @dataclass(frozen=True)
    class RsicdRun(RunOptions):
        data: RsicdData = field(default_factory=RsicdData)

A recipe is a function that returns such options (`itemizedclip.training.recipes`).
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from itemizedclip.models.dual_encoder import DualEncoder
from itemizedclip.models.factory import create_model
from itemizedclip.objectives.loss import ObjectiveOptions
from itemizedclip.runtime.errors import UserError
from itemizedclip.runtime.flags import at_least, at_most, check, max_processes
from itemizedclip.runtime.processes import DistributedSettings, check_device_name

OptionsT = TypeVar("OptionsT", bound="RunOptions")


MAX_NAME = 200
"""Characters of a run's name."""

MAX_RANK = 4096
"""Of adapters; no tower is as wide."""


@dataclass(frozen=True)
class RunSettings:
    """Where a run lives, where it starts and what it keeps."""

    recipe: str = ""
    """Named set of options that the flags override (see the list above)."""

    name: str = ""
    """Name of the run and of its folder below --logs. Empty: recipe, date and time."""

    logs: Annotated[Path, tyro.conf.arg(aliases=("--logs-dir",))] = Path("logs")
    """Folder that holds one folder per run."""

    resume: str | None = None
    """Checkpoint to continue from, or latest: the newest of run --name or of this recipe; none yet: a fresh start."""

    seed: int = 0
    """Seed of weights, data order, items, augmentation and dropout."""

    deterministic: bool = False
    """The same bits whenever the run is repeated on such a machine: nothing is decided by measured time, operations of
    PyTorch without a repeatable form are refused."""

    device: str = "auto"
    """auto (a GPU when there is one), cpu, cuda, or cuda:N (one process only)."""

    save_frequency: int = 1
    """Epochs between kept checkpoints epoch_N.pt (always after the last); other epochs write the rolling latest.pt."""

    save_every_steps: int = 0
    """Also write latest.pt every so many steps; 0: at the end of epochs only."""

    save_async: bool = False
    """Train on while a checkpoint is being written, from a copy in the memory of the machine."""

    save_sharded: bool = False
    """Each process writes its part of the tensors into a folder beside the .pt, which then names it; for models that
    take one process too long to write. --logs must be a disk that all processes see."""

    delete_previous_checkpoint: bool = False
    """Keep only the newest epoch_N.pt."""

    val_frequency: int = 1
    """Evaluate every so many epochs and after the last; 0: never."""

    save_every_minutes: float = 0.0
    """Also write latest.pt whenever so many minutes have passed since the last checkpoint; 0: never."""

    keep_last: int = 0
    """Keep only the newest so many epoch_N.pt, and the best with --keep-best; 0: all."""

    keep_best: str = ""
    """Also keep the epoch_N.pt with the highest value of this measure, such as toy/sum; with :min behind it, lowest."""

    def __post_init__(self) -> None:
        at_least(self, seed=0, save_frequency=1, save_every_steps=0, val_frequency=0, save_every_minutes=0, keep_last=0)
        at_most(self, seed=2**63 - 1)
        check(
            not self.keep_best or re.fullmatch(r"[^:]+/[^:]+(:(min|max))?", self.keep_best) is not None,
            f"--keep-best is {self.keep_best!r}; expected evaluator/measure, such as val/text_to_image_R@1, and :min "
            "behind it where lower is better",
        )
        check(
            not (self.keep_best and not self.val_frequency),
            "--keep-best needs evaluations; drop --val-frequency 0, or --keep-best",
        )
        plain = not set(self.name) & {"/", "\\"} and not self.name.startswith(".")
        plain = plain and self.name.isprintable() and len(self.name) <= MAX_NAME
        check(
            plain,
            f"--name is {self.name!r}; expected a plain folder name of at most {MAX_NAME} characters; its parent is "
            "--logs",
        )
        check_device_name(self.device)


@dataclass(frozen=True)
class ModelSettings:
    """The model and how its towers compute."""

    model: str = "ViT-B-16-ItemizedCLIP"
    """Name of a model config, or path of a config .json."""

    pretrained: Path | None = None
    """Start from the weights of a run's or a released checkpoint (.pt, .safetensors) instead of random ones."""

    lock_image: bool = False
    """Freeze the image tower."""

    lock_text: bool = False
    """Freeze the text tower."""

    lock_text_freeze_layer_norm: bool = True
    """With --lock-text: its LayerNorms too, and no dropout; the published chest CT run freezes neither."""

    lora_image: int = 0
    """Rank of adapters (LoRA) that train in the image tower instead of its weights; 0: none. Needs '.[finetune]'."""

    lora_text: int = 0
    """The same in the text tower."""

    grad_checkpointing: bool = False
    """Recompute the towers' activations in the backward pass: less memory, about a third more time."""

    grad_checkpointing_keeps: Literal["nothing", "attention"] = "nothing"
    """attention: with --grad-checkpointing keep what attention returns and recompute projections, MLPs and norms."""

    patch_dropout: float = 0.0
    """Share of an image's patches that training leaves out, at random per image and step."""

    patch_dropout_until: float = 0.9
    """Share of the run's steps after which --patch-dropout ends, so that the model finishes on whole images."""

    torchcompile: bool = False
    """Compile the towers block by block (minutes at the start, faster steps)."""

    precision: Literal["auto", "amp", "amp_bf16", "bf16", "fp32"] = "auto"
    """amp: float16, scaled loss; bf16: amp_bf16 with bfloat16 towers; auto: amp_bf16 where the device computes
    bfloat16, else amp on GPUs and fp32 on CPUs."""

    def __post_init__(self) -> None:
        at_least(self, lora_image=0, lora_text=0)
        at_most(self, lora_image=MAX_RANK, lora_text=MAX_RANK)
        for tower in ("image", "text"):
            check(
                not (getattr(self, f"lora_{tower}") and getattr(self, f"lock_{tower}")),
                f"--lora-{tower} trains adapters in a tower that --lock-{tower} freezes; drop one of them",
            )
        at_least(self, patch_dropout=0, patch_dropout_until=0)
        at_most(self, patch_dropout_until=1)
        check(self.patch_dropout < 1, f"--patch-dropout is {self.patch_dropout}; expected a share below 1")
        check(
            self.grad_checkpointing or self.grad_checkpointing_keeps == "nothing",
            "--grad-checkpointing-keeps says what --grad-checkpointing keeps; add it",
        )


@dataclass(frozen=True)
class ObjectiveSettings(ObjectiveOptions):
    """Weights of the objectives; a weight of 0 switches the term off, and nothing but --baseline else does."""

    ila_weight: Annotated[float, tyro.conf.arg(aliases=("--ila-fac",))] = ObjectiveOptions.ila_weight
    ila_keep_rate: Annotated[float, tyro.conf.arg(aliases=("--ila-mask-rate",))] = ObjectiveOptions.ila_keep_rate
    kta_weight: Annotated[float, tyro.conf.arg(aliases=("--key-token-alignment-loss",))] = ObjectiveOptions.kta_weight
    key_token_fraction: Annotated[float, tyro.conf.arg(aliases=("--key-token-thresh",))] = (
        ObjectiveOptions.key_token_fraction
    )
    mps_weight: Annotated[float, tyro.conf.arg(aliases=("--mps-fac",))] = ObjectiveOptions.mps_weight
    iis_weight: Annotated[float, tyro.conf.arg(aliases=("--iis-loss",))] = ObjectiveOptions.iis_weight
    worst_positive_factor: Annotated[float, tyro.conf.arg(aliases=("--comp-upfac",))] = (
        ObjectiveOptions.worst_positive_factor
    )


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its schedule."""

    lr: float = 5e-4
    """Peak learning rate."""

    weight_decay: Annotated[float, tyro.conf.arg(aliases=("--wd",))] = 0.2
    """On weights of two or more dimensions; bias, norm and logit-scale parameters have none."""

    beta1: float = 0.9
    """AdamW β1."""

    beta2: float = 0.98
    """AdamW β2."""

    eps: float = 1e-6
    """AdamW ε."""

    epochs: int = 32
    """Passes over the data; also the length of the cosine schedule."""

    warmup: int = 2000
    """Steps of linear warm-up from 0 to --lr."""

    lr_scheduler: Literal["cosine", "const"] = "cosine"
    """After the warm-up: cosine to 0 at the last step, or constant."""

    grad_clip_norm: float | None = None
    """Scale the gradient down to this norm when it is longer; None: never."""

    max_nonfinite_steps: int = 10
    """Stop after so many steps in a row whose loss or gradient is not finite; each such step is skipped."""

    def __post_init__(self) -> None:
        at_least(self, lr=0, weight_decay=0, epochs=1, warmup=0, max_nonfinite_steps=1)
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            check(0 <= value < 1, f"--{name} is {value}; expected 0 ≤ {name} < 1")
        check(self.eps > 0, f"--eps is {self.eps}; expected a positive number")
        clip = self.grad_clip_norm
        check(clip is None or clip > 0, f"--grad-clip-norm is {clip}; expected a positive norm or None")


MAX_ITEMS = 4096
"""Item slots per image, far above what any data set has."""


@dataclass(frozen=True)
class LoadingSettings:
    """Batches and the processes that load them."""

    batch_size: int = 128
    """Images loaded together, per process; a process's contrastive batch: batch-size × accum-batch × accum-freq."""

    accum_batch: int = 1
    """Loaded batches joined into one contrastive batch, encoded at once."""

    accum_freq: int = 1
    """Joins further by gradient caching: a batch so many times larger in the same memory, about a third more time."""

    num_sampled_captions: int = 7
    """K, text items per image in training."""

    workers: int | None = None
    """Loader processes per training process; None: one per core that a training process has, at most 8; 0: load in
    the training process."""

    on_bad_sample: Literal["skip", "stop"] = "stop"
    """A sample that cannot be used is replaced by another, logged and counted, or ends the run."""

    max_bad_fraction: float = 0.01
    """With --on-bad-sample skip: stop when more than this share of a process's samples of one epoch is bad."""

    loader_timeout: float = 20.0
    """Minutes without a batch after which the run ends, naming the samples the loader processes are at; 0: never."""

    def __post_init__(self) -> None:
        at_least(
            self, batch_size=1, accum_batch=1, accum_freq=1, num_sampled_captions=1, workers=0, loader_timeout=0
        )  # fmt: skip
        at_most(
            self, num_sampled_captions=MAX_ITEMS, batch_size=2**24, accum_batch=2**16, accum_freq=2**16,
            workers=max_processes(),
        )  # fmt: skip
        fraction = self.max_bad_fraction
        check(0 <= fraction <= 1, f"--max-bad-fraction is {fraction}; expected a share in [0, 1]")

    @property
    def step_batch(self) -> int:
        """Images per process and optimizer step: the contrastive batch of one rank."""
        return self.batch_size * self.accum_batch * self.accum_freq


@dataclass(frozen=True)
class ParallelSettings:
    """How the model is shared out among several processes; without effect on one."""

    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """ddp: a whole copy on each process; fsdp2: shards of parameters, gradients and optimizer, for towers that leave
    no room for batches."""

    static_graph: bool = False
    """ddp: promise that every step uses the same parameters, so that none is looked for."""

    compress_gradients: bool = False
    """ddp: gradients travel in bfloat16, which halves the traffic and rounds them."""

    check_ranks_every: int = 500
    """Steps between comparisons of all processes' parameters, bit by bit (ddp); 0: never."""

    def __post_init__(self) -> None:
        at_least(self, check_ranks_every=0)
        for name in ("static_graph", "compress_gradients"):
            check(
                self.parallel == "ddp" or not getattr(self, name),
                f"--{name.replace('_', '-')} belongs to --parallel ddp; drop one of them",
            )


TRACKERS = ("wandb", "tensorboard")


@dataclass(frozen=True)
class LoggingSettings:
    """What is written beside metrics.jsonl and log.txt, which every run has."""

    report_to: str = ""
    """Comma-separated: wandb, tensorboard, or all. Needs pip install -e '.[tracking]'."""

    log_every_n_steps: int = 10
    """Steps between lines of metrics.jsonl, and of the log when standard error is not a terminal."""

    health_every: int = 100
    """Steps between reports on every process: lines of the log, and health.prom for Prometheus; 0: never."""

    wandb_project: str = "itemizedclip"
    """Project of the wandb run."""

    def __post_init__(self) -> None:
        at_least(self, log_every_n_steps=1, health_every=0)
        unknown = [name for name in self._names() if name not in (*TRACKERS, "all", "none")]
        check(not unknown, f"--report-to names {', '.join(unknown)}; expected wandb, tensorboard or all")

    def _names(self) -> list[str]:
        return [name.strip() for name in self.report_to.split(",") if name.strip()]

    @property
    def trackers(self) -> tuple[str, ...]:
        """The trackers to report to."""
        names = self._names()
        return TRACKERS if "all" in names else tuple(name for name in TRACKERS if name in names)


@dataclass(frozen=True)
class RunOptions:
    """Everything that decides a run. Subclasses add the group `data`."""

    run: RunSettings = field(default_factory=RunSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    loading: LoadingSettings = field(default_factory=LoadingSettings)
    distributed: DistributedSettings = field(default_factory=DistributedSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)

    def __post_init__(self) -> None:
        check(
            not (self.model.torchcompile and self.loading.accum_freq > 1),
            "--torchcompile together with --accum-freq above 1 is not tested; use --accum-batch or drop --torchcompile",
        )
        check(
            not (self.model.torchcompile and self.run.deterministic),
            "--torchcompile chooses kernels by measured time, which --deterministic rules out; drop one of them",
        )
        check(
            not (self.model.torchcompile and self.parallel.parallel == "fsdp2"),
            "--torchcompile together with --parallel fsdp2 is not tested; drop one of them",
        )

    def create_model(self) -> DualEncoder:
        """The model with its initial weights, on the CPU; called on every rank, under `launch_run`."""
        return create_model(self.model.model)


# --- plain data ------------------------------------------------------------------------------------------------------


def options_to_dict(options: Any) -> dict[str, Any]:
    """Options as JSON-able data, one dict per group, for params.json and checkpoints."""
    return {f.name: _plain(getattr(options, f.name)) for f in dataclasses.fields(options)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return options_to_dict(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"options hold a {type(value).__name__} ({value!r}); use numbers, strings, paths, lists or dicts")


def options_from_dict(cls: type[OptionsT], values: Mapping[str, Any], *, source: str = "params.json") -> OptionsT:
    """The inverse of `options_to_dict`; fields that are absent keep their default.

    Raises:
        ValueError: a field that does not exist, or a value of the wrong type; names source and field.
    """
    return _from_plain(cls, values, source)


def _from_plain(kind: Any, value: Any, where: str) -> Any:
    if typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: expected an object, found {value!r}")
        hints = typing.get_type_hints(kind, include_extras=True)
        names = [f.name for f in dataclasses.fields(kind)]
        unknown = [name for name in value if name not in names]
        if unknown:
            raise UserError(f"{where}: unknown field {', '.join(unknown)}; expected among {', '.join(names)}")
        build: Callable[..., Any] = kind  # type: ignore[assignment]
        return build(**{name: _from_plain(hints[name], value[name], f"{where}: {name}") for name in value})
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _from_plain(next(a for a in arguments if a is not type(None)), value, where)
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}: expected a list, found {value!r}")
        return origin(_from_plain(arguments[0], entry, where) for entry in value)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{where}: expected one of {', '.join(map(str, arguments))}, found {value!r}")
        return value
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
        raise UserError(f"{where}: expected {kind.__name__}, found {value!r}")
    return value


def flatten_options(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested plain options as {"optimizer.lr": 0.001, …}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten_options(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
