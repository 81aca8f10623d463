"""Flags that commands share: which checkpoint, on what, how many at once, where the results go.

A command's own options are a dataclass that inherits one of these; `--checkpoint` and the published `--resume` mean the
same in all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from itemizedclip.runtime.flags import at_least, at_most, max_processes
from itemizedclip.runtime.processes import DistributedSettings, check_device_name


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """A trained model and where it computes."""

    checkpoint: Annotated[Path, tyro.conf.arg(aliases=("--resume",))]
    """Checkpoint of a run or a released one (.pt, .safetensors)."""

    model: str | None = None
    """Model name or config .json; only for released checkpoints, which do not carry their config."""

    text_model: str | None = None
    """BERT folder or hub name whose tokenizer a released checkpoint uses; default: the hub name of its config."""

    device: str = "auto"
    """auto (a GPU when there is one), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        check_device_name(self.device)


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(CheckpointOptions):
    """Evaluation of a checkpoint over a set of images or studies, on one process or several."""

    batch_size: int = 64
    """Images per forward pass and process."""

    workers: int | None = None
    """Processes that read images; None: one per core that this process has, at most 8; 0: none besides this one."""

    precision: Literal["fp32", "amp", "amp_bf16", "auto"] = "auto"
    """Of the towers; scores are float32. auto: bfloat16 where the device computes it (docs/training.md: what that does
    to scores)."""

    on_bad_sample: Literal["skip", "stop"] = "stop"
    """An image that cannot be read is left out, named and counted, or ends the evaluation."""

    output: Path | None = None
    """Where the results go; default: beside the checkpoint."""

    distributed: Annotated[DistributedSettings, tyro.conf.arg(name="")] = field(default_factory=DistributedSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, batch_size=1, workers=0)
        at_most(self, workers=max_processes())
