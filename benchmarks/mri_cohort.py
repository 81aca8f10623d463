"""Proof of the brain pipeline on the synthetic cohort: write it, train, score held-out studies, see where items look.

    python benchmarks/mri_cohort.py --output proof_mri                  # brain MRI, minutes on one core
    python benchmarks/mri_cohort.py --output proof_ct --domain head_ct  # head CT: RSNA and CQ500
    python benchmarks/mri_cohort.py --output quick --quick              # seconds: shows that it runs, learns nothing

Each step is the command a user would give: the training program of train_mri.sh with the debug recipe, the zero-shot
scripts. The exit status is 1 when a goal is not reached. Nothing in the cohort is anatomy: the numbers say that the
code learns and looks where the finding is, not how well it would do on patients. Figures: benchmarks/README.md.

Attention is read at the most attended token of each planted finding's own item. Beside each share stands chance, what a
token drawn at random from the whole study would reach.

Axes: T items of a study, S series, d h w patches of one series.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from itemizedclip_radiology.benchmarks.head_ct import Cq500Options, RsnaOptions
from itemizedclip_radiology.benchmarks.pub_brain_5 import PubBrain5Options
from itemizedclip_radiology.benchmarks.zero_shot import StudyOptions
from itemizedclip_radiology.data.volumes import Size
from itemizedclip_radiology.recipes import main_studies
from itemizedclip_radiology.synthetic.cohort import (
    BRAIN_TEST_SIZE,
    write_head_ct_benchmarks,
    write_pub_brain_5,
    write_studies,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor

from itemizedclip.data.batch import ItemCollator
from itemizedclip.evaluation.attention import item_maps
from itemizedclip.evaluation.benchmark import evaluate
from itemizedclip.evaluation.results import EvaluationReport, write_results
from itemizedclip.models.factory import LoadedModel, load_pretrained
from itemizedclip.runtime.errors import reported_errors
from itemizedclip.viewer.sets import ExplainSet, open_explain_set

DISEASES = ("stroke", "glioma", "meningioma", "metastasis")
GOALS = {
    "mri": {"mean_auc": 0.9, "attention/within_one_patch": 0.9},
    "head_ct": {"mean_auc": 0.85, "attention/within_one_patch": 0.7},
}
"""In this time the head CT model does not learn skull fractures, which are thin lines; it finds the rest."""


@dataclass(frozen=True)
class Options:
    """Sizes of the proof."""

    output: Path
    """New folder for the cohort, the run and results.json."""

    domain: Literal["mri", "head_ct"] = "mri"
    """What to write, train on and evaluate."""

    num_train: int = 480
    """Training studies."""

    num_test: int = 200
    """Studies of each zero-shot set."""

    epochs: int = 20
    """Passes over the training studies."""

    batch_size: int = 16
    """Studies of a step."""

    seed: int = 0
    """Seed of cohort and training."""

    quick: bool = False
    """Smallest size of everything, no goals: seconds."""

    size: Size = field(default=BRAIN_TEST_SIZE, init=False)
    num_valid: int = field(default=40, init=False)

    def __post_init__(self) -> None:
        if self.quick:
            for name, value in {
                "num_train": 8, "num_test": 10, "epochs": 1, "batch_size": 4, "size": (8, 32, 32), "num_valid": 2,
            }.items():  # fmt: skip
                object.__setattr__(self, name, value)


# --- steps -----------------------------------------------------------------------------------------------------------


def write_cohort(options: Options, root: Path) -> None:
    """Training and validation studies, and the zero-shot sets of the domain."""
    sizes: dict[str, Any] = {"seed": options.seed, "size": options.size}
    write_studies(
        root / "train", kind=options.domain, num_train=options.num_train, num_valid=options.num_valid, **sizes
    )
    if options.domain == "mri":
        write_pub_brain_5(root / "pub_brain_5", num_studies=options.num_test, **sizes)
    else:
        write_head_ct_benchmarks(root, num_studies=options.num_test, **sizes)


def train(options: Options, root: Path) -> Path:
    """A small HLIP by the debug recipe; its checkpoint."""
    steps = options.epochs * (options.num_train // options.batch_size)
    main_studies([
        "--recipe", "mri_debug" if options.domain == "mri" else "ct_debug",
        "--data-root", str(root / "train"), "--json-root", str(root / "train"),
        "--volume-size", *map(str, options.size), "--logs", str(options.output), "--name", "run",
        "--epochs", str(options.epochs), "--batch-size", str(options.batch_size), "--warmup", str(steps // 10),
        "--seed", str(options.seed), "--val-frequency", str(max(1, options.epochs // 2)),
        "--save-frequency", str(options.epochs),
    ])  # fmt: skip
    return options.output / "run" / "checkpoints" / f"epoch_{options.epochs}.pt"


def zero_shot(options: Options, root: Path, checkpoint: Path) -> dict[str, float]:
    """Metrics of the domain's benchmarks, by set; `mean_auc` is the one with a goal."""
    kinds: dict[str, type[StudyOptions]] = (
        {"pub_brain_5": PubBrain5Options} if options.domain == "mri" else {"rsna": RsnaOptions, "cq500": Cq500Options}
    )
    metrics: dict[str, float] = {}
    for name, kind in kinds.items():
        found = evaluate(kind(checkpoint=checkpoint, data_dir=root / name, workers=0))
        metrics |= {f"{name}/{key}": value for key, value in found.items()}
    if options.domain == "mri":
        aucs = [metrics[f"pub_brain_5/{disease}/auc"] for disease in DISEASES]
    else:
        aucs = [metrics["rsna/mean_auc"], metrics["cq500/mean_auc"]]
    return metrics | {"mean_auc": sum(aucs) / len(aucs)}


# --- attention -------------------------------------------------------------------------------------------------------


@dataclass
class Landed:
    """How often the most attended token is right, and how often a token drawn at random would be."""

    hits: list[tuple[bool, bool, bool]] = field(default_factory=list)
    chances: list[tuple[float, float, float]] = field(default_factory=list)

    names = ("series", "mask", "within_one_patch")

    def add(self, peak: int, mask_SDHW: Tensor, patch: Sequence[int]) -> None:
        """One finding: number of the peak token, and its mask in the model's voxels, empty in series that hide it."""
        covered = patches_of(mask_SDHW, patch)
        near = F.max_pool3d(covered[:, None].float(), kernel_size=3, stride=1, padding=1)[:, 0] > 0
        in_series = covered.flatten(1).any(1)[:, None, None, None].expand_as(covered)
        tables = [table.flatten() for table in (in_series, covered, near)]
        a, b, c = (bool(table[peak]) for table in tables)
        self.hits.append((a, b, c))
        a_chance, b_chance, c_chance = (float(table.float().mean()) for table in tables)
        self.chances.append((a_chance, b_chance, c_chance))

    def __add__(self, other: Landed) -> Landed:
        return Landed(self.hits + other.hits, self.chances + other.chances)

    def metrics(self) -> dict[str, float]:
        """Share and chance of each."""
        shares = torch.tensor(self.hits, dtype=torch.float64).mean(0).tolist()
        chances = torch.tensor(self.chances, dtype=torch.float64).mean(0).tolist()
        return {
            **{f"attention/{name}": share for name, share in zip(self.names, shares)},
            **{f"attention/{name}/chance": chance for name, chance in zip(self.names, chances)},
        }


def patches_of(mask_SDHW: Tensor, patch: Sequence[int]) -> Tensor:
    """bool (S, d, h, w): patches with at least one voxel of the mask."""
    return F.max_pool3d(mask_SDHW[:, None].float(), kernel_size=tuple(patch))[:, 0] > 0


def held_out_findings(options: Options, root: Path, loaded: LoadedModel) -> list[ExplainSet]:
    """The zero-shot studies with findings, read as any viewer reads them, with the masks of what was planted."""
    names = ["pub_brain_5"] if options.domain == "mri" else ["rsna", "cq500"]
    sets = []
    for name in names:
        folder = root / name
        studies = folder / "pub_brain_5" if name == "pub_brain_5" else folder
        sets.append(open_explain_set(studies, folder / "findings.json", loaded, folder / "masks", allow_missing=True))
    return sets


def where_items_look(sets: Sequence[ExplainSet], loaded: LoadedModel) -> dict[str, Landed]:
    """Kind of finding → what came of it over all studies."""
    landed: dict[str, Landed] = {}
    model = loaded.model.eval()
    patch = loaded.config["vision_cfg"]["patch_size"]
    for studies in sets:
        for index, entry in enumerate(studies.entries):
            sample = studies[index]
            masks = studies.masks(index)
            assert masks is not None
            batch = ItemCollator(loaded.tokenizer, len(sample.items))([sample])
            (maps,) = item_maps(model, batch, normalise_tokens=True)
            for item, weights, mask in zip(entry.items, maps.weights, masks):
                landed.setdefault(item.key, Landed()).add(int(weights.argmax()), mask, patch)
    return landed


# --- report ----------------------------------------------------------------------------------------------------------


def report(options: Options, checkpoint: Path, metrics: dict[str, float], facts: dict[str, Any]) -> bool:
    """Write results.json, print the table; whether the goals are reached."""
    path = options.output / "results.json"
    write_results(path, EvaluationReport(f"synthetic {options.domain}", "corrected", str(checkpoint), metrics, facts))
    goals = GOALS[options.domain]
    table = Table(title=f"Synthetic {options.domain}: {facts['num_findings']} planted findings", title_justify="left")
    for heading in ("held-out studies", "value", "chance", "goal"):
        table.add_column(heading, justify="left" if heading == "held-out studies" else "right")
    for name, meaning in (
        ("mean_auc", "zero-shot mean AUC"),
        ("attention/series", "attention peaks in a series that shows it"),
        ("attention/mask", "attention peaks in a patch of its mask"),
        ("attention/within_one_patch", "… or in a patch beside it"),
    ):
        chance = metrics.get(f"{name}/chance", 0.5)
        table.add_row(meaning, f"{metrics[name]:.3f}", f"{chance:.3f}", f"{goals[name]}" if name in goals else "")
    console = Console()
    console.print(table)
    near = [f"{name} {one['attention/within_one_patch']:.2f}" for name, one in sorted(facts["by_finding"].items())]
    console.print(f"in or beside the mask, by finding: {', '.join(near)}", soft_wrap=True)
    console.print(f"training {facts['training_s']:.0f} s; written to {path}", soft_wrap=True)
    return all(metrics[name] >= goal for name, goal in goals.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the proof; 0 when the goals are reached."""
    options = tyro.cli(Options, args=argv, prog="mri_cohort.py", description=(__doc__ or "").split("\n\n")[0])
    with reported_errors("mri_cohort.py"):
        if options.output.exists() and any(options.output.iterdir()):
            raise FileExistsError(errno.EEXIST, "is not empty; give a new folder with --output", str(options.output))
        root = options.output / "cohort"
        write_cohort(options, root)
        started = perf_counter()
        checkpoint = train(options, root)
        training_s = perf_counter() - started
        metrics = zero_shot(options, root, checkpoint)
        loaded = load_pretrained(checkpoint)
        landed = where_items_look(held_out_findings(options, root, loaded), loaded)
        everything = sum(landed.values(), Landed())
        facts = {
            "num_train": options.num_train,
            "num_test": options.num_test,
            "epochs": options.epochs,
            "seed": options.seed,
            "size": options.size,
            "patch": loaded.config["vision_cfg"]["patch_size"],
            "num_findings": len(everything.hits),
            "by_finding": {name: {"num": len(one.hits), **one.metrics()} for name, one in landed.items()},
            "training_s": training_s,
        }
        reached = report(options, checkpoint, metrics | everything.metrics(), facts)
    return 0 if reached or options.quick else 1


if __name__ == "__main__":
    sys.exit(main())
