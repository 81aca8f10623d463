"""The published models at their real size: one training step and the zero-shot scoring of two studies, by the real
programs.

    python benchmarks/full_size_step.py --output full_mri --threads 2
    python benchmarks/full_size_step.py --output full_chest --domain chest

mri (and head CT, which has the same model and sizes): HLIPSN_BiomedBERT_81616_itemizedclip, 10 series of 48×224×224
voxels per study, 11,760 tokens, K 7, text tower trained.
chest: CTRATE_HLIP_BiomedBERT_itemizedclip, one scan of 112×336×336 voxels, 2,744 tokens, K 10, BERT frozen.
Both with random weights, activation checkpointing and the published recipe otherwise. Prints time and peak memory of
each program, reading and the checkpoint included; a quarter of an hour on one CPU core and 6 GB of disk for mri, a
third of both for chest. Figures: benchmarks/README.md.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal

import torch
import tyro
from itemizedclip_radiology.data.volumes import BRAIN_SIZE, CHEST_SIZE
from itemizedclip_radiology.models.radiology_model import RadiologyItemizedCLIP
from itemizedclip_radiology.synthetic.cohort import write_ct_rate, write_pub_brain_5, write_rad_chestct, write_studies
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, BertModel

from itemizedclip.models.factory import load_model_config
from itemizedclip.runtime.errors import reported_errors

PROGRAMS = Path(__file__).parents[1] / "Radiology_Tasks" / "src"
NUM_SERIES = 10
_SEED_WITH_DIFFERENT_LABELS = 1
"""Of the two scans one has a finding that the other lacks, so that AUCs exist."""


@dataclass(frozen=True)
class Options:
    """What to measure."""

    output: Path
    """New folder for studies, run and scores."""

    domain: Literal["mri", "chest"] = "mri"
    """Which model."""

    studies: int = 1
    """Studies of the training step."""

    threads: int = 1
    """CPU threads of each program."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


@dataclass(frozen=True)
class Domain:
    """One published model and its programs.

    Attributes:
        model: its name.
        recipe: of its training program.
        study: what one study is, for the table.
        trainer: training program.
        scorer: zero-shot program.
        write: (folder, training studies) → flags that name the training data; the folder also gets zero_shot/, two
            studies to score.
    """

    model: str
    recipe: str
    study: str
    trainer: str
    scorer: str
    write: Callable[[Path, int], list[str]]


def write_brain(folder: Path, studies: int) -> list[str]:
    """MRI studies, and Pub-Brain-5 with a normal study and a stroke, each of ten scans."""
    write_studies(folder / "train", kind="mri", num_train=studies, num_valid=1, size=BRAIN_SIZE)
    write_pub_brain_5(folder / "zero_shot", num_studies=2, size=BRAIN_SIZE)
    for study in (path.parent for path in sorted(folder.glob("zero_shot/pub_brain_5/*/*/*-T1.pt"))):
        scans = sorted(study.glob("*.pt"))
        for number in range(NUM_SERIES - len(scans)):
            shutil.copy(scans[number % len(scans)], study / f"{study.name}-AGAIN{number}.pt")
    return ["--data-root", str(folder / "train"), "--json-root", str(folder / "train")]


def write_chest(folder: Path, studies: int) -> list[str]:
    """CT-RATE scans without labels, and two of Rad-ChestCT."""
    write_ct_rate(folder / "train", num_train=studies, num_valid=0, size=CHEST_SIZE)
    write_rad_chestct(folder / "zero_shot", num_studies=2, seed=_SEED_WITH_DIFFERENT_LABELS, size=CHEST_SIZE)
    return ["--data-root", str(folder / "train"), "--items-json", str(folder / "train" / "itemized.json")]


DOMAINS: Mapping[str, Domain] = {
    "mri": Domain(
        "HLIPSN_BiomedBERT_81616_itemizedclip", "mri", f"{NUM_SERIES} series", "open_mri_train/main.py",
        "open_mri_test/zero_shot_pub_brain_5.py", write_brain,
    ),
    "chest": Domain(
        "CTRATE_HLIP_BiomedBERT_itemizedclip", "ctrate", "1 scan", "open_ct_rate/main.py",
        "open_ct_rate/zeroshot_rad_chestct.py", write_chest,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One program: wall time, processor time, and the largest memory it held on the CPU."""

    seconds: float
    processor_s: float
    peak_gb: float

    def __str__(self) -> str:
        return f"{self.seconds:.0f} s ({self.processor_s:.0f} s of processor), {self.peak_gb:.1f} GB"


def run(command: Sequence[str]) -> Measured:
    """Run a Python program to its end.

    Raises:
        SystemExit: it failed; its messages have been shown.
    """
    started = perf_counter()
    process = subprocess.Popen([sys.executable, *command])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(process.returncode)
    return Measured(perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9)


def write_bert(folder: Path, model: str) -> Path:
    """A BERT folder of the model's shape: random weights, the embedded vocabulary."""
    folder.mkdir(parents=True)
    shape = load_model_config(model)["text_cfg"]["hf_config"]
    torch.manual_seed(0)
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    torch.save(BertModel(BertConfig(**shape), add_pooling_layer=False).state_dict(), folder / "pytorch_model.bin")
    shutil.copy(RadiologyItemizedCLIP.config_folder / "builtin_vocab.txt", folder / "vocab.txt")
    return folder


def measure(options: Options) -> dict[str, str]:
    """Row of the table → value."""
    folder, domain = options.output.resolve(), DOMAINS[options.domain]
    common = ["--workers", "0", "--threads", str(options.threads), "--device", options.device]
    data = domain.write(folder, options.studies)
    trained = run([
        str(PROGRAMS / domain.trainer), "--recipe", domain.recipe, *data, "--image-weights", "None",
        "--text-model", str(write_bert(folder / "bert", domain.model)), "--batch-size", str(options.studies),
        "--accum-batch", "1", "--epochs", "1", "--warmup", "0", "--val-frequency", "0", "--log-every-n-steps", "1",
        "--logs", str(folder), "--name", "run", "--precision", "auto", *common,
    ])  # fmt: skip
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    (step,) = [line for line in lines if line["kind"] == "train"]
    scored = run([
        str(PROGRAMS / domain.scorer), "--data-dir", str(folder / "zero_shot"),
        "--resume", str(folder / "run" / "checkpoints" / "epoch_1.pt"), *common,
    ])  # fmt: skip
    return {
        f"training step, {options.studies} × {domain.study}": f"{step['step_s']:.0f} s",
        "its loss": f"{step['loss']:.3f}",
        "training program, start to end, peak memory": str(trained),
        f"zero-shot program, 2 × {domain.study}, peak memory": str(scored),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Write studies, run both programs, print."""
    options = tyro.cli(Options, args=argv, prog="full_size_step.py", description=(__doc__ or "").split("\n\n")[0])
    with reported_errors("full_size_step.py"):
        if options.output.exists() and any(options.output.iterdir()):
            raise FileExistsError(errno.EEXIST, "is not empty; give a new folder with --output", str(options.output))
        heading = f"{DOMAINS[options.domain].model}, {options.threads} thread(s)"
        table = Table(title=heading, title_justify="left", show_header=False)
        for name, value in measure(options).items():
            table.add_row(name, value)
        Console().print(table)


if __name__ == "__main__":
    main()
