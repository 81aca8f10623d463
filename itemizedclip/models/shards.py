"""Tensors of a checkpoint in a folder that every rank writes its part of (`torch.distributed.checkpoint`).

The folder is what PyTorch's own tools read. What it holds is trusted no more than other files: its index, a pickle, is
read by an unpickler that knows the index' own classes and nothing else; the parts are read with `weights_only=True`.
A folder counts once a checkpoint file names it with the SHA-256 of each of its files; each rank hashes what it wrote.

Tensors have flat names: model/NAME, and optimizer/NUMBER/NAME of the parameter of that number.
"""

from __future__ import annotations

import logging
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from itemizedclip.models.archive import DamagedError, unusable_tensor
from itemizedclip.runtime.collectives import is_distributed
from itemizedclip.runtime.files import file_sha256, write_text

MODEL, OPTIMIZER = "model/", "optimizer/"
SUFFIX = ".shards"
INDEX = ".metadata"
DIGEST = ".sha256"

_INDEX_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "_MEM_FORMAT_ENCODING", "StorageMeta",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "WindowsPath"},
}  # fmt: skip

Files = dict[str, str]
"""Name → SHA-256 of each file of a folder."""


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name not in _INDEX_CLASSES.get(module, ()):
            raise DamagedError(f"its {INDEX} asks for {module}.{name}, which no index of tensors needs")
        return super().find_class(module, name)


# --- writing ---------------------------------------------------------------------------------------------------------


def write_shards(
    tensors: Mapping[str, Tensor], folder: Path, group: dist.ProcessGroup | None, *, in_background: bool
) -> Future[None]:
    """Write this rank's part; every rank must call it.

    Args:
        tensors: the same names on every rank: shards of each, or the same whole tensor.
        folder: new, the same on every rank, on a disk that all of them see.
        group: of all ranks, with a backend for CPUs; in the background one that nothing else uses.
        in_background: return when the tensors are copied; the future then ends when all ranks have written.

    Raises:
        OSError, CheckpointException: by the future: some rank could not write.
    """
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

    class Writer(dcp.FileSystemWriter):
        """Leaves the digest of each file beside it."""

        def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
            written = super().write_data(plan, planner)
            for name in {result.storage_data.relative_path for result in written.wait()}:
                write_text(folder / f"{name}{DIGEST}", file_sha256(folder / name))
            return written

    writer = Writer(folder, sync_files=True)
    # Said by the thread that writes, too, which `catch_warnings` does not reach.
    warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    with _quiet():
        if in_background:
            answer: Any = dcp.async_save(dict(tensors), storage_writer=writer, process_group=group)
            pending: Future[None] = getattr(answer, "upload_completion", answer)
            return pending
        done: Future[None] = Future()
        dcp.save(dict(tensors), storage_writer=writer, process_group=group)
        done.set_result(None)
        return done


def collect_digests(folder: Path) -> Files:
    """The digests that the ranks left, once all have written; their files are removed."""
    found = {INDEX: file_sha256(folder / INDEX)}
    for path in sorted(folder.glob(f"*{DIGEST}")):
        found[path.name.removesuffix(DIGEST)] = path.read_text()
    for name in found:
        (folder / f"{name}{DIGEST}").unlink(missing_ok=True)
    return found


def cpu_group() -> dist.ProcessGroup | None:
    """A new group of all ranks with a backend for CPUs; None with one process. Every rank must call it."""
    group: Any = dist.new_group(backend="gloo") if is_distributed() else None
    return cast("dist.ProcessGroup | None", group)


@contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch tells of every save that it is an experiment, and which arguments it will rename."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- reading ---------------------------------------------------------------------------------------------------------


def check_record(record: Any) -> bool:
    """Whether what a checkpoint says of its folder has the form of it: a name beside it, digests by name."""
    if not isinstance(record, dict) or set(record) != {"folder", "files"}:
        return False
    folder, files = record["folder"], record["files"]
    return (
        isinstance(folder, str)
        and _is_name(folder)
        and folder.endswith(SUFFIX)
        and isinstance(files, dict)
        and INDEX in files
        and all(isinstance(n, str) and _is_name(n) and isinstance(d, str) for n, d in files.items())
    )


def _is_name(text: str) -> bool:
    return bool(text) and text == Path(text).name and text not in (".", "..")


def verify_shards(folder: Path, files: Files) -> None:
    """Compare every file with its digest, then look at every tensor, one at a time.

    Raises:
        DamagedError: something is missing, does not fit or is not finite.
    """
    if not folder.is_dir():
        raise DamagedError(f"its folder {folder.name} is not beside it")
    for name, expected in files.items():
        if not (folder / name).is_file():
            raise DamagedError(f"{folder.name} lacks {name}")
        if file_sha256(folder / name) != expected:
            raise DamagedError(f"the SHA-256 of {folder.name}/{name} is not the one it was written with")
    for name, shape in read_index(folder).items():
        tensors = {name: torch.empty(shape.shape, dtype=shape.dtype)}
        read_shards(folder, tensors)
        problem = unusable_tensor(tensors)
        if problem:
            raise DamagedError(problem)


def read_index(folder: Path) -> dict[str, Tensor]:
    """Name → a tensor without data, of shape and kind.

    Raises:
        DamagedError: no index of tensors.
    """
    metadata = _metadata(folder)
    return {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in metadata.state_dict_metadata.items()
    }


def _metadata(folder: Path) -> Any:
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

    try:
        with (folder / INDEX).open("rb") as file:
            metadata = _IndexUnpickler(file).load()
    except DamagedError:
        raise
    except FileNotFoundError:
        raise DamagedError(f"its folder {folder.name} is not beside it, or lacks {INDEX}") from None
    except Exception as error:
        raise DamagedError(f"{folder.name}/{INDEX} is no index ({type(error).__name__})") from error
    entries = getattr(metadata, "state_dict_metadata", None)
    places = getattr(metadata, "storage_data", None)
    if not isinstance(metadata, Metadata) or not isinstance(entries, dict) or not isinstance(places, dict):
        raise DamagedError(f"{folder.name}/{INDEX} is no index of tensors")
    if not all(isinstance(name, str) and isinstance(e, TensorStorageMetadata) for name, e in entries.items()):
        raise DamagedError(f"{folder.name}/{INDEX} names something besides tensors")
    if not all(_is_name(str(getattr(place, "relative_path", ""))) for place in places.values()):
        raise DamagedError(f"{folder.name}/{INDEX} names files outside its folder")
    return metadata


def read_shards(folder: Path, into: dict[str, Tensor]) -> None:
    """Fill tensors, whole ones or shards of any number of ranks, with what the folder holds; each rank for itself.

    Raises:
        DamagedError: it does not hold them, or in another shape.
    """
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint import DefaultLoadPlanner

    metadata = _metadata(folder)
    for name, tensor in into.items():
        there = metadata.state_dict_metadata.get(name)
        if there is None or there.size != tensor.shape:
            raise DamagedError(f"{folder.name} holds no {name} of shape {tuple(tensor.shape)}")
    reader, planner = dcp.FileSystemReader(folder), DefaultLoadPlanner()
    try:
        reader.set_up_storage_reader(metadata, True)
        planner.set_up_planner(dict(into), metadata, True)
        plan = reader.prepare_local_plan(planner.create_local_plan())
        reader.read_data(plan, planner).wait()
    except Exception as error:
        raise DamagedError(f"{folder.name} cannot be read ({type(error).__name__}: {error})") from error


def read_whole(folder: Path) -> dict[str, Tensor]:
    """All tensors, whole.

    Raises:
        DamagedError: see `read_shards`.
    """
    tensors = {name: torch.empty(like.shape, dtype=like.dtype) for name, like in read_index(folder).items()}
    read_shards(folder, tensors)
    return tensors


def flat(state_dict: Mapping[str, Any], optimizer_state: Mapping[Any, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Tensors of a model and of its optimizer under flat names."""
    tensors = {f"{MODEL}{name}": value for name, value in state_dict.items()}
    for number, state in optimizer_state.items():
        tensors |= {f"{OPTIMIZER}{number}/{name}": value for name, value in state.items()}
    return tensors


def nested(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]:
    """The inverse of `flat`.

    Raises:
        DamagedError: a name that `flat` does not give.
    """
    model: dict[str, Tensor] = {}
    optimizer: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(MODEL):
            model[name[len(MODEL) :]] = value
            continue
        number, _, what = name[len(OPTIMIZER) :].partition("/")
        if not name.startswith(OPTIMIZER) or not number.isdecimal() or not what:
            raise DamagedError(f"it holds {name!r}, which no run writes")
        optimizer.setdefault(int(number), {})[what] = value
    return model, optimizer


def remove_shards(folder: Path) -> None:
    """Remove a folder of shards; one that is not there is no matter."""
    shutil.rmtree(folder, ignore_errors=True)
