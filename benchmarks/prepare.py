"""Studies per minute and memory of `itemizedclip prepare studies`, on made DICOM studies of usual sizes.

    python benchmarks/prepare.py --output DIR [--recipe mri|ct|chest-ct] [--studies 6] [--workers 1]

Processor seconds are those of the processes that prepare, so that a busy machine does not count;
memory is the largest of any of them. Noise in the voxels makes files as hard to read as real ones; nothing is
compressed in them, which real archives may be.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from itemizedclip_radiology.data.volumes import read_volume
from itemizedclip_radiology.prepare import studies
from itemizedclip_radiology.prepare.studies import (
    PrepareStudiesOptions,
    Task,
    open_tasks,
    prepare_entry,
    read_records,
)
from itemizedclip_radiology.viewing.inputs import scan_series
from scan_files import affine_of, brain_phantom, chest_phantom, world_of, write_dicom

from itemizedclip.runtime.jobs import run_jobs

SIZES = {
    "mri": ((512, 512, 24), (0.45, 0.45, 6.0), 8),
    "ct": ((512, 512, 32), (0.45, 0.45, 5.0), 2),
    "chest-ct": ((512, 512, 300), (0.7, 0.7, 1.0), 1),
}
"""Recipe → voxels, mm, series of a study."""

DESIGN_STUDIES, DESIGN_CORES = 200_000, 64


def write_studies(root: Path, recipe: str, count: int) -> int:
    """DICOM studies; returns their bytes."""
    shape, spacing, series = SIZES[recipe]
    affine = affine_of("LPS", spacing, shape)
    draw = chest_phantom if recipe != "mri" else brain_phantom
    clean = draw(world_of(shape, affine), np.array([8.0, -12.0, 9.0]))
    noise = np.random.default_rng(0)
    for study in range(count):
        for number in range(1, series + 1):
            voxels = clean + noise.integers(0, 20, shape, dtype=np.int16)
            write_dicom(
                root / f"study{study}" / f"s{number}", voxels, affine, description=f"AX {number}",
                modality="MR" if recipe == "mri" else "CT", number=number,
            )  # fmt: skip
    return sum(path.stat().st_size for path in root.rglob("*.dcm"))


def measured(task: Task, path: str) -> None:
    """Prepare an entry, and write what its process used."""
    begun = time.process_time()
    prepare_entry(task)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    Path(path).write_text(json.dumps({"processor_s": time.process_time() - begun, "mib": usage.ru_maxrss / 2**10}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--recipe", choices=list(SIZES), default="mri")
    parser.add_argument("--studies", type=int, default=6)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    source, to = options.output / "source", options.output / "prepared"
    for folder in (source, to):
        shutil.rmtree(folder, ignore_errors=True)
    size = write_studies(source, options.recipe, options.studies)
    tasks = open_tasks(PrepareStudiesOptions(source=source, to=to, recipe=options.recipe, key_file=to.parent / "key"))
    started = time.monotonic()
    jobs = [(task, str(options.output / f"used{number}.json")) for number, task in enumerate(tasks)]
    ends = list(run_jobs(measured, jobs, workers=options.workers, preload=(studies.__name__,)))
    seconds = time.monotonic() - started
    assert not any(end.failure for end in ends), ends
    used = [json.loads(Path(path).read_text()) for _, path in jobs]
    kept = [record for record in read_records(to) if record.file]
    each = sum(one["processor_s"] for one in used) / options.studies
    mib = size / options.studies / 2**20
    print(f"{options.recipe}: {options.studies} studies of {mib:.0f} MiB, {len(kept)} volumes")
    print(f"wall {seconds:.1f} s with {options.workers} at once: {60 * options.studies / seconds:.1f} studies a minute")
    print(f"processor {each:.2f} s a study: {60 / each:.1f} studies a minute and core")
    print(f"largest process {max(one['mib'] for one in used):.0f} MiB")
    hours = DESIGN_STUDIES * each / DESIGN_CORES / 3600
    print(f"{DESIGN_STUDIES:,} studies on {DESIGN_CORES} cores: {hours:.1f} hours")
    if options.recipe == "mri":
        # What a data set of own scans costs each time, against one of prepared files.
        begun = time.process_time()
        scan_series(next(source.glob("*/s1")), (48, 224, 224))
        anew = time.process_time() - begun
        begun = time.process_time()
        for record in kept[:8]:
            read_volume(to / record.file)
        prepared = (time.process_time() - begun) / min(8, len(kept))
        print(f"one series: {1e3 * anew:.0f} ms from DICOM, {1e3 * prepared:.1f} ms from its file")


if __name__ == "__main__":
    main()
