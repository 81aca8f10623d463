"""Weights from files and from the Hugging Face hub: plain tensors only, every refusal with its remedy.

Nothing here executes what it reads: safetensors, or torch files under `weights_only=True`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from itemizedclip.models.weights import read_checkpoint
from itemizedclip.runtime.errors import MissingFileError, UserError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class LoadReport:
    """What happened to every key of a weights file.

    Attributes:
        source: the file.
        used: keys whose tensor went into the model, possibly reshaped.
        skipped: key → why it was not used.
        untouched: parameters of the model that the file does not set; they keep their initial values.
    """

    source: str
    used: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    untouched: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.used)} tensors used, {len(self.skipped)} skipped"]
        lines += [f"  skipped {key}: {reason}" for key, reason in self.skipped.items()]
        if self.untouched:
            lines.append(f"  keep their initial values: {', '.join(self.untouched)}")
        return "\n".join(lines)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` or torch file by name; a `state_dict` or `model` wrapper is opened.

    Raises:
        CheckpointError (a ValueError): no such file, damaged, holding Python objects, or without tensors.
    """
    content = read_checkpoint(Path(path).expanduser())["state_dict"]
    if isinstance(content.get("model"), Mapping):
        content = content["model"]
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path}: expected named tensors, found none (keys {list(content)[:4]}): give a state dict")
    return tensors


def find_prefix(keys: Iterable[str], name: str, *, beside: str) -> str | None:
    """The shortest prefix under which both `name` and `beside` are among `keys`; None if there is none."""
    keys = set(keys)
    prefixes = [key[: -len(name)] for key in keys if key == name or key.endswith("." + name)]
    return min((p for p in prefixes if p + beside in keys), key=len, default=None)


def assign_parameters(module: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> list[str]:
    """Copy `tensors` into `module`, all of whose parameters must be there in their shape; returns the keys left over.

    Raises:
        ValueError: a parameter is missing or has another shape; nothing has been copied then.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in tensors]
    if missing:
        raise UserError(f"{source}: lacks {len(missing)} of {len(own)} weights, first {', '.join(missing[:3])}")
    for name, value in own.items():
        if value.shape != tensors[name].shape:
            raise UserError(
                f"{source}: {name} has shape {tuple(tensors[name].shape)}, the model expects {tuple(value.shape)}"
            )
    module.load_state_dict({name: tensors[name] for name in own})
    return [name for name in tensors if name not in own]


def local_folder(source: str | Path, patterns: Sequence[str], *, flag: str, fetch: bool = True) -> Path:
    """Folder that `source` names: itself, or the download (or cached copy) of the hub repository `owner/name`.

    Args:
        source: an existing folder, or a hub name.
        patterns: the files to fetch from the hub; code is never among them.
        flag: the command-line flag to name in messages.
        fetch: False: no network is used, only what was fetched before.

    Raises:
        FileNotFoundError: neither a folder nor a hub name, or the hub has no such repository or cannot be reached.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    files = ", ".join(patterns)
    if not _HUB_NAME.fullmatch(str(source)):
        raise MissingFileError(f"{source}: no such folder; {flag} takes a folder with {files}, or a hub name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(patterns), local_files_only=not fetch))
    except (OSError, HFValidationError) as error:
        if not fetch:
            raise MissingFileError(
                f"a model config names {source}, a repository of the Hugging Face hub that has not been fetched; no "
                f"file makes this program fetch anything: ask for it with {flag} {source}, or bring its files and pass "
                f"{flag} FOLDER"
            ) from error
        raise MissingFileError(
            f"{source}: not a local folder, not in the hub cache, not downloadable ({type(error).__name__}: offline, "
            f"HF_HUB_OFFLINE set, or no such repository). On a machine with network fetch those of {files} that exist "
            f"from https://huggingface.co/{source}, bring them here in one folder and pass {flag} FOLDER"
        ) from error
