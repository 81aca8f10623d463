"""Tensors of a whole pickled module, such as the published series-name encoder, without running anything of the file.

`torch.save(module)` writes the module's classes by name and its tensors beside them; reading it back imports the
classes and lets the file call whatever it names. Here every name but those that put tensors and plain containers
together becomes an inert stand-in: a class that takes any arguments and keeps what it is given. The tensors are then
found where `torch.nn.Module` keeps them.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch
from torch import Tensor

from itemizedclip.models.archive import DamagedError, unusable_tensor, verify_archive
from itemizedclip.models.weights import CheckpointError

MAX_PICKLE_BYTES = 64 * 2**20
"""A module's description is some kilobytes; its tensors lie beside it."""

MAX_DEPTH = 100

_REBUILDING = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): torch._utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch", "Size"): torch.Size,
}
"""All that a file may call."""


class _Inert:
    """Stands for a class or function of the file; made and called with anything, it does nothing."""

    state: Mapping[Any, Any]

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        made = super().__new__(cls)
        made.state = {}
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, Mapping) else {}

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Lists made by subclasses."""

    def extend(self, values: Any) -> None:
        """Lists made by subclasses."""

    def add(self, value: Any) -> None:
        """Sets made by subclasses."""

    def __call__(self, *_: Any, **__: Any) -> _Inert:
        return _Inert()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _REBUILDING.get((module, name)) or type("Inert", (_Inert,), {"__doc__": f"{module}.{name}"})


def _load(file: IO[bytes], **options: Any) -> Any:
    return _Unpickler(file, **options).load()


_PICKLE = SimpleNamespace(__name__="inert", Unpickler=_Unpickler, load=_load)


def read_pickled_module(path: str | Path) -> dict[str, Tensor]:
    """Parameters and buffers of a pickled `torch.nn.Module` by name, on the CPU.

    Raises:
        CheckpointError: no archive of `torch.save`, damaged, or without a module that has tensors.
    """
    path = Path(path)
    try:
        verify_archive(path)
        with zipfile.ZipFile(path) as archive:
            names = [entry.filename.rpartition("/")[2] for entry in archive.infolist()]
            described = sum(entry.file_size for entry in archive.infolist() if entry.filename.endswith(".pkl"))
        if "constants.pkl" in names or described > MAX_PICKLE_BYTES:
            raise CheckpointError(f"{path}: is no module saved by torch.save; give a state dict")
        module = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_PICKLE)
    except CheckpointError:
        raise
    except DamagedError as error:
        raise CheckpointError(f"{path}: is damaged ({error}); copy it again") from error
    except Exception as error:
        raise CheckpointError(
            f"{path}: no module that can be read without running it ({type(error).__name__}: {error}); save its "
            "state_dict alone and use that"
        ) from error
    tensors = dict(_tensors_of(module, "", 0)) if isinstance(module, _Inert) else {}
    if not tensors:
        raise CheckpointError(f"{path}: holds no module with tensors; give a state dict")
    problem = unusable_tensor(tensors)
    if problem:
        raise CheckpointError(f"{path}: cannot be used, {problem}; take another file")
    return tensors


def _tensors_of(module: _Inert, prefix: str, depth: int) -> list[tuple[str, Tensor]]:
    if depth > MAX_DEPTH:
        raise CheckpointError(f"module {prefix[:60]}… is nested deeper than {MAX_DEPTH} levels; give a state dict")
    found = []
    for kind in ("_parameters", "_buffers"):
        entries = module.state.get(kind)
        for name, value in entries.items() if isinstance(entries, Mapping) else ():
            if isinstance(value, Tensor):
                found.append((f"{prefix}{name}", value.detach()))
    inner = module.state.get("_modules")
    for name, value in inner.items() if isinstance(inner, Mapping) else ():
        if isinstance(value, _Inert):
            found += _tensors_of(value, f"{prefix}{name}.", depth + 1)
    return found
