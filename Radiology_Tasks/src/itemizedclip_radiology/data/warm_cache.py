"""Build the cache of windowed volumes before a run, so that its first epoch does not pay for it.

    python -m itemizedclip_radiology.data.warm_cache --data-root DIR --cache-dir CACHE --workers 16

DIR holds CT-RATE's train/ and valid/, or Rad-ChestCT's scans; every volume of theirs is read once. What is in the cache
already is left alone, so that a stopped command goes on. Training and evaluation with the same --cache-dir,
--cache-type and --input-info read what was built here.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

from torch.utils.data import DataLoader, Dataset

from itemizedclip.data.batch import BadSampleError
from itemizedclip.data.preflight import PreflightError
from itemizedclip.data.workers import LOADER_TIMEOUT_S, delivered
from itemizedclip.runtime.errors import MissingFileError, UserError, reported_errors
from itemizedclip.runtime.flags import at_least, loader_processes, read_flags
from itemizedclip.runtime.logs import logging_to_console, progress_bar
from itemizedclip.runtime.processes import shield_loader_worker
from itemizedclip_radiology.benchmarks.chest_ct import rad_chestct_id
from itemizedclip_radiology.data.chest import ChestInput, ChestSettings, read_hu
from itemizedclip_radiology.data.ct_rate_tree import EXCLUDED_RECONSTRUCTIONS, parse_volume_name
from itemizedclip_radiology.data.volume_cache import VolumeCache
from itemizedclip_radiology.data.volumes import CHEST_SIZE

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WarmCacheOptions(ChestSettings):
    """What to build."""

    data_root: Path
    """CT-RATE's folder with train/ or valid/ in it, or Rad-ChestCT's folder of scans."""

    workers: int | None = None
    """Processes that read volumes; None: one per core, at most 8; 0: none besides this one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache_dir is None:
            raise UserError("no cache folder given: set --cache-dir")
        at_least(self, workers=0)


@dataclass(frozen=True)
class _Volumes(Dataset[str]):
    """Reading an entry builds its cache file; the entry is the reason why it could not be built, else empty."""

    root: Path
    names: list[Path]
    cache: VolumeCache
    options: ChestInput

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> str:
        name = self.names[index]
        source = self.root / name
        try:
            self.cache.open(name, source, partial(read_hu, source, self.options))
        except (BadSampleError, FileNotFoundError) as error:
            return str(error)
        return ""


def is_volume(name: Path) -> bool:
    """Whether a path below the data folder is that of a CT-RATE or Rad-ChestCT volume, and one that is used."""
    try:
        return parse_volume_name(name.stem).path == name and name.stem not in EXCLUDED_RECONSTRUCTIONS
    except ValueError:
        pass
    try:
        return name.parts in ((f"{rad_chestct_id(name.stem)}.pt",), (name.stem, name.name))
    except ValueError:
        return False


def volume_names(root: Path) -> list[Path]:
    """Volumes below a folder, relative to it, sorted."""
    return sorted(name for path in root.rglob("*.pt") if is_volume(name := path.relative_to(root)))


def build_cache(options: WarmCacheOptions) -> int:
    """Build what is missing.

    Returns:
        volumes that cannot be used; each is named in the log.

    Raises:
        FileNotFoundError: no such folder, or no volume below it.
        PreflightError: no volume can be used.
    """
    root = options.data_root.expanduser()
    if not root.is_dir():
        raise MissingFileError(f"{root}: no such folder; expected chest CT volumes (--data-root)")
    names = volume_names(root)
    if not names:
        raise MissingFileError(
            f"{root}: no volume below it; expected valid/valid_1/valid_1_a/valid_1_a_1.pt, … (CT-RATE) or "
            "<id>/<id>.pt or <id>.pt (Rad-ChestCT)"
        )
    chest = options.chest_input(CHEST_SIZE)
    cache = options.cache(chest.window)
    assert cache is not None
    started = perf_counter()
    volumes = _Volumes(root, names, cache, chest)
    workers = loader_processes(options.workers)
    loader = DataLoader(
        volumes,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=shield_loader_worker,
        timeout=LOADER_TIMEOUT_S if workers else 0,
    )
    reasons = []
    with progress_bar("Building the cache", enabled=True) as advance:
        for done, reason in enumerate(delivered(loader), start=1):
            if reason:
                reasons.append(reason)
                logger.warning(reason)
            advance(done, len(names))
    if len(reasons) == len(names):
        raise PreflightError(f"none of the {len(names):,} volumes below {root} can be used; the first: {reasons[0]}")
    size_gb = sum(path.stat().st_size for path in cache.folder.rglob("*.safetensors")) / 1e9
    seconds = perf_counter() - started
    logger.info(
        "%d of %d volumes are in %s (%.3g GB), %.3g s", len(names) - len(reasons), len(names), cache.folder, size_gb,
        seconds,
    )  # fmt: skip
    return len(reasons)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit code is 1 when some volume could not be used."""
    options = read_flags(
        WarmCacheOptions,
        argv,
        prog="python -m itemizedclip_radiology.data.warm_cache",
        description="Build the cache of windowed chest CT volumes before a run.",
    )
    with reported_errors("warm_cache"), logging_to_console(0):
        return 1 if build_cache(options) else 0


if __name__ == "__main__":
    raise SystemExit(main())
