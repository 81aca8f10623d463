"""The command `itemizedclip compare`: objectives against each other on the same data, seed by seed.

itemizedclip compare --output compare                                  every objective, 3 seeds, embedded scenes
itemizedclip compare --output compare --level hard --objectives clip,flair,recipe --workers 2
itemizedclip compare --output compare -- --epochs 4 --num-train 1000    what follows -- goes to every training run
itemizedclip compare --output compare --shard 3/8                      this process's eighth, such as of a Slurm array

Every run is a process of its own, trained and evaluated by `itemizedclip demo` (scenes) or `itemizedclip train`, in a
folder DIR/OBJECTIVE-seedN. A run with results.json is finished: the same command goes on where it was.
"""

from __future__ import annotations

import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from itemizedclip.commands.demo import RECIPES as SCENES_RECIPES
from itemizedclip.data.scenes import LEVELS
from itemizedclip.evaluation.comparison import CONFIDENCE, Summary, summarise
from itemizedclip.evaluation.results import format_measure
from itemizedclip.runtime.errors import UserError, reported_errors
from itemizedclip.runtime.files import check_writable, parse_json, read_json, read_lines, write_json, written_whole
from itemizedclip.runtime.flags import at_least, at_most, check, max_processes, read_flags, usable_cores
from itemizedclip.runtime.logs import literal, progress_bar
from itemizedclip.runtime.registry import unknown_name
from itemizedclip.training import recipes
from itemizedclip.viewer.comparison import comparison_figure
from itemizedclip.viewer.figures import save_figure

PROG = "itemizedclip compare"
DESCRIPTION = (
    "Train and evaluate objectives on the same data with the same seeds, and say by how much they differ. Each run is "
    "a process of its own; finished ones are not repeated. Flags of training follow after --."
)

# --- objectives ------------------------------------------------------------------------------------------------------

_TCS_ALONE = {
    "kta": ("--kta-weight", "0"),
    "mps": ("--mps-weight", "0"),
    "iis": ("--iis-weight", "0"),
    "uwp": ("--worst-positive-factor", "1"),
    "mask": ("--ila-keep-rate", "1"),
    "duplicates": ("--no-mask-duplicates",),
}
"""Part of the method → the flags that switch it off."""

LADDER_KEEP_RATE = "0.8"
"""Of the rung +mask: the published one of natural images."""


def _rung(*parts: str) -> tuple[str, ...]:
    """TCS and these parts, with the recipe's own weights; all else off."""
    flags = [flag for part, off in _TCS_ALONE.items() if part not in parts for flag in off]
    return (*flags, *(("--ila-keep-rate", LADDER_KEEP_RATE) if "mask" in parts else ()))


@dataclass(frozen=True)
class Objective:
    """One objective: what it is, and the flags of training that choose it."""

    about: str
    flags: tuple[str, ...] = ()


OBJECTIVES: dict[str, Objective] = {
    "clip": Objective("CLIP, one random item of each image", ("--baseline", "clip")),
    "siglip": Objective("SigLIP, one random item of each image", ("--baseline", "siglip")),
    "concat": Objective("CLIP, all items of an image as one text", ("--baseline", "concat")),
    "mps": Objective(
        "multi-positive sigmoid loss on global features alone",
        ("--ila-weight", "0", "--mps-weight", "1", "--kta-weight", "0", "--iis-weight", "0", "--no-mask-duplicates"),
    ),
    "flair": Objective("FLAIR with this project's denominators", ("--baseline", "flair")),
    "flair_own": Objective("FLAIR with the denominators of its released code", ("--baseline", "flair_own")),
    "tcs": Objective("text-conditioned sigmoid loss (ILA over all tokens)", _rung()),
    "+iis": Objective("tcs and inter-item separation", _rung("iis")),
    "+mps": Objective("the same and the global multi-positive loss", _rung("iis", "mps")),
    "+uwp": Objective("the same and the upweighted worst positive", _rung("iis", "mps", "uwp")),
    "+kta": Objective("the same and key token alignment", _rung("iis", "mps", "uwp", "kta")),
    "+mask": Objective(
        f"the same and masked attention (keep rate {LADDER_KEEP_RATE}): the paper's objective",
        _rung("iis", "mps", "uwp", "kta", "mask"),
    ),
    "recipe": Objective("the recipe's objective as it is"),
    "recipe+coverage": Objective("the recipe's and the coverage term", ("--coverage-weight", "0.5")),
    "recipe+contradiction": Objective(
        "the recipe's and contradictions as hard negatives", ("--contradiction-weight", "0.5")
    ),
}
"""What --objectives chooses from. The ladder tcs … +mask adds one part of the paper at a time, with the weights of the
recipe and without the duplicate masking that some recipes have."""

PUBLISHED = tuple(name for name in OBJECTIVES if not name.startswith("recipe+"))
"""What is compared by default: published objectives and the recipe."""

_LONG_TEXT = ("--model", "ViT-scenes-long-text-ItemizedCLIP")
"""The scenes' model with a context of 64 tokens: five items as one text do not fit into 16."""


# --- options ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """What to compare, on what, and where to keep it."""

    output: Path
    """Folder of the runs, compare.json, table.md and comparison.png; the same folder goes on."""

    data: str = "scenes"
    """scenes (embedded), own:TRAIN.jsonl,VALID.jsonl (your images, docs/own-data.md), or a recipe of training."""

    level: str | None = None
    """Difficulty of the scenes; None: that of the recipe."""

    objectives: str = ",".join(PUBLISHED)
    """Comma-separated objectives; also recipe+coverage and recipe+contradiction."""

    reference: str = ""
    """Objective that the others are compared with; empty: flair where it is among them, else the first."""

    seeds: int = 3
    """Runs of each objective, with seeds 0 … seeds − 1."""

    workers: int = 1
    """Runs at a time; the cores are shared among them."""

    shard: str = "1/1"
    """Which part of the runs this process does: i/n with 1 ≤ i ≤ n; the table covers what all have finished so far."""

    def __post_init__(self) -> None:
        at_least(self, seeds=1, workers=1)
        at_most(self, workers=max_processes())
        names = self.names
        for name in [*names, *([self.reference] if self.reference else [])]:
            check(name in OBJECTIVES, unknown_name("objective", name, OBJECTIVES))
        check(bool(names) and len(set(names)) == len(names), f"--objectives is {self.objectives!r}; expected each once")
        known = not self.reference or self.reference in names
        check(known, f"--reference {self.reference} is not among --objectives {self.objectives}")
        check(
            self.level is None or (self.data in SCENES_RECIPES and self.level in LEVELS),
            f"--level is {self.level!r} with --data {self.data}; levels belong to scenes: {', '.join(LEVELS)}",
        )
        self.part()

    @property
    def names(self) -> list[str]:
        """The objectives, in their order."""
        return [name.strip() for name in self.objectives.split(",") if name.strip()]

    @property
    def chosen_reference(self) -> str:
        """What the others are compared with."""
        return self.reference or ("flair" if "flair" in self.names else self.names[0])

    def part(self) -> tuple[int, int]:
        """(i, n) of --shard."""
        first, slash, last = self.shard.partition("/")
        holds = bool(slash) and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)
        check(holds, f"--shard is {self.shard!r}; expected i/n with 1 ≤ i ≤ n, such as 2/8")
        return int(first), int(last)


# --- the plan --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedRun:
    """One training run of the comparison.

    Attributes:
        objective: its name.
        seed: of weights, data and order.
        folder: holds results.json, output.txt and the run folder `run`.
        arguments: of `itemizedclip`.
    """

    objective: str
    seed: int
    folder: Path
    arguments: tuple[str, ...]

    @property
    def command(self) -> str:
        """As a user would type it."""
        return shlex.join(["itemizedclip", *self.arguments])


def plan(options: CompareOptions, flags: Sequence[str] = ()) -> list[PlannedRun]:
    """Every run, seed by seed, so that the first seed of all objectives is known early.

    Args:
        options: what to compare.
        flags: of training, for every run.

    Raises:
        UserError: data that are neither scenes, nor own images, nor a recipe.
    """
    return [_planned(options, name, seed, flags) for seed in range(options.seeds) for name in options.names]


def _planned(options: CompareOptions, name: str, seed: int, flags: Sequence[str]) -> PlannedRun:
    folder = options.output / f"{name}-seed{seed}"
    chosen = OBJECTIVES[name].flags
    place = ("--seed", str(seed), "--logs", str(folder), "--name", "run", "--resume", "latest")
    if options.data in SCENES_RECIPES:
        level = () if options.level is None else ("--level", options.level)
        text = _LONG_TEXT if name == "concat" else ()
        start = ("demo", "--recipe", options.data, *level, "--num-pictures", "0", *text)
    elif options.data.startswith("own:"):
        files = options.data.removeprefix("own:").split(",")
        if len(files) != 2 or not all(files):
            raise UserError(f"--data is {options.data!r}; expected own:TRAIN.jsonl,VALID.jsonl")
        start = ("train", "own", "--train-file", files[0], "--val-file", files[1])
    else:
        # The registry is not imported by name: a module that has one is taken for a command that begins with a name.
        if not options.data.partition(":")[0].endswith(".py") and options.data not in recipes.RECIPES.names():
            raise UserError(f"--data is {options.data!r}; expected scenes, own:TRAIN.jsonl,VALID.jsonl, or a recipe: "
                            f"{', '.join(recipes.RECIPES.names())}")  # fmt: skip
        start = ("train", options.data)
    return PlannedRun(name, seed, folder, (*start, *chosen, *flags, *place))


# --- running ---------------------------------------------------------------------------------------------------------


def finished(run: PlannedRun) -> dict[str, Any] | None:
    """What a finished run left: command, metrics, seconds; None when it has not finished.

    Raises:
        UserError: results of another command, which would be compared as if they were of this one.
    """
    path = run.folder / "results.json"
    if not path.is_file():
        return None
    results = read_json(path, holding="results of a run of itemizedclip compare")
    if not isinstance(results, dict) or not isinstance(results.get("metrics"), dict):
        raise UserError(f"{path}: expected command and metrics of a run of itemizedclip compare; remove it to run anew")
    if results.get("command") != run.command:
        raise UserError(
            f"{path}: is of another command ({results.get('command')}); now it would be ({run.command}): give another "
            f"--output, or remove {run.folder}"
        )
    return results


class Runner:
    """Runs processes, and ends them all when it is stopped."""

    def __init__(self, workers: int) -> None:
        self._threads = str(max(1, usable_cores() // workers))
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False
        self._lock = threading.Lock()

    def run(self, run: PlannedRun) -> str:
        """Train and evaluate; returns "" or why it failed."""
        run.folder.mkdir(parents=True, exist_ok=True)
        output = run.folder / "output.txt"
        environment = {"OMP_NUM_THREADS": self._threads, **os.environ}
        started = time.monotonic()
        with output.open("ab") as file:
            with self._lock:
                if self._stopped:
                    return "stopped"
                process = subprocess.Popen(  # noqa: S603  our own interpreter and flags
                    [sys.executable, "-m", "itemizedclip", *run.arguments],
                    stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment,
                )  # fmt: skip
                self._running.add(process)
            status = process.wait()
            self._running.discard(process)
        if status:
            lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            return f"{run.objective}, seed {run.seed}: {lines[-1] if lines else f'exit status {status}'} ({output})"
        metrics = read_metrics(run.folder / "run")
        seconds = round(time.monotonic() - started, 1)
        write_json(run.folder / "results.json", {"command": run.command, "seconds": seconds, "metrics": metrics})
        return ""

    def stop(self) -> None:
        """End what runs; it goes on from its last checkpoint when the command is given again."""
        with self._lock:
            self._stopped = True
        for process in list(self._running):
            process.terminate()


def read_metrics(folder: Path) -> dict[str, float]:
    """What a run folder says of the trained model: results.json of a demo, else the last evaluation of training.

    Raises:
        UserError: it was not evaluated.
    """
    results = folder / "results.json"
    if results.is_file():
        found: dict[str, float] = read_json(results, holding="an evaluation")["metrics"]
        return found
    path = folder / "metrics.jsonl"
    lines = [parse_json(line, source=path, holding="a run's metrics") for line in read_lines(path, holding="metrics")]
    evaluations = [line for line in lines if line.get("kind") == "eval"]
    if not evaluations:
        raise UserError(f"{path}: holds no evaluation; give the recipe something to evaluate, and no --val-frequency 0")
    return {key: value for key, value in evaluations[-1].items() if "/" in key and isinstance(value, (int, float))}


def run_all(runs: Sequence[PlannedRun], workers: int) -> list[str]:
    """Do the runs; returns why those that failed did."""
    runner, failures = Runner(workers), []
    with progress_bar("Runs") as on_progress, ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(runner.run, run) for run in runs]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                failures += [message] if (message := future.result()) else []
                on_progress(done, len(futures))
        except BaseException:
            runner.stop()
            raise
    return failures


# --- the finding -----------------------------------------------------------------------------------------------------

MEASURES = {
    "zero_shot/macro_auc": "zero-shot AUC",
    "retrieval/text_to_image_R@1": "text → image R@1",
    "retrieval/image_to_text_R@1": "image → text R@1",
    "contrast/mean": "contrasts",
    "contrast/binding": "binding",
    "contrast/number": "number",
    "contrast/relation": "relation",
    "contrast/absence": "absence",
    "contrast/scene": "scene",
    "explain/pointing_game": "pointing game",
    "explain/miou": "mIoU",
    "explain/mll": "MLL",
    "explain/mams": "mAMS (lower is better)",
    "explain/nowhere_share_absent": "absent items look nowhere",
    "explain/nowhere_share_present": "present items look nowhere (lower is better)",
}
"""Measures of scenes shown in table and picture, if there; of other data, the first eight."""


def comparison(options: CompareOptions, runs: Sequence[PlannedRun]) -> dict[str, Any]:
    """Everything as plain data: the command of each run, its figures, what is missing, means and differences.

    AUCs of single classes stay in the runs' own results.json.
    """
    results = [(run, _without_classes(result)) for run in runs if (result := finished(run)) is not None]
    scores: dict[str, dict[int, dict[str, float]]] = {}
    for run, result in results:
        scores.setdefault(run.objective, {})[run.seed] = result["metrics"]
    ordered = {name: scores[name] for name in options.names if name in scores}
    done = {(run.objective, run.seed) for run, _ in results}
    return {
        "data": options.data,
        "level": options.level,
        "reference": options.chosen_reference,
        "confidence": CONFIDENCE,
        "machine": {"processor": platform.machine(), "cores": usable_cores(), "workers": options.workers},
        "objectives": {name: _plain(OBJECTIVES[name]) for name in options.names},
        "runs": [{"objective": run.objective, "seed": run.seed, **result} for run, result in results],
        "missing": [run.command for run in runs if (run.objective, run.seed) not in done],
        "summary": {
            name: {measure: asdict(summary) for measure, summary in of_measure.items()}
            for name, of_measure in summarise(ordered, options.chosen_reference).items()
        },
    }


def _without_classes(result: Mapping[str, Any]) -> dict[str, Any]:
    metrics = {name: value for name, value in result["metrics"].items() if "/auc/" not in name}
    return {**result, "metrics": metrics}


def _plain(objective: Objective) -> dict[str, Any]:
    return {"about": objective.about, "flags": list(objective.flags)}


def shown_measures(found: Mapping[str, Any]) -> dict[str, str]:
    """Measure → label of what table and picture show."""
    there = dict.fromkeys(measure for of_measure in found["summary"].values() for measure in of_measure)
    known = {measure: label for measure, label in MEASURES.items() if measure in there}
    return known or {measure: measure for measure in list(there)[:8]}


def markdown(found: Mapping[str, Any]) -> str:
    """A table of means ± deviations, and one of paired differences with intervals, for a document."""
    shown = shown_measures(found)
    head = "| objective | seeds | " + " | ".join(shown.values()) + " |\n|---|---|" + "---|" * len(shown)
    values, differences = [head], [head]
    for name, of_measure in found["summary"].items():
        own = {measure: Summary(**of_measure[measure]) for measure in shown if measure in of_measure}
        seeds = max(summary.count for summary in own.values()) if own else 0
        cells = [_value(own.get(measure)) for measure in shown]
        values.append(f"| `{name}` | {seeds} | " + " | ".join(cells) + " |")
        if name != found["reference"]:
            cells = [_difference(own.get(measure)) for measure in shown]
            differences.append(f"| `{name}` | {seeds} | " + " | ".join(cells) + " |")
    return "\n".join(
        [
            *values,
            "",
            f"Difference to `{found['reference']}`, seed by seed, with its {found['confidence']:.0%} interval "
            "(Student's t); in bold where that leaves out 0:",
            "",
            *differences,
            "",
        ]
    )


def _value(summary: Summary | None) -> str:
    if summary is None:
        return "–"
    spread = "" if summary.deviation is None else f" ± {summary.deviation:.3f}"
    return f"{summary.mean:.3f}{spread}"


def _difference(summary: Summary | None) -> str:
    if summary is None or summary.difference is None:
        return "–"
    if summary.low is None or summary.high is None:
        return f"{summary.difference:+.3f}"
    text = f"{summary.difference:+.3f} [{summary.low:+.3f}, {summary.high:+.3f}]"
    return f"**{text}**" if summary.differs else text


def terminal_table(found: Mapping[str, Any]) -> Table:
    """Means over seeds, for the terminal; table.md has the deviations."""
    shown, summary = shown_measures(found), found["summary"]
    table = Table(title=literal(f"{found['data']} {found['level'] or ''}".strip()), title_justify="left", box=None)
    table.add_column("", no_wrap=True)
    for name in summary:
        table.add_column(literal(name), justify="right", no_wrap=True)
    for measure, label in shown.items():
        means = [of_measure[measure]["mean"] if measure in of_measure else None for of_measure in summary.values()]
        table.add_row(literal(label), *("–" if mean is None else format_measure(measure, mean) for mean in means))
    return table


def write_finding(options: CompareOptions, found: Mapping[str, Any]) -> list[Path]:
    """compare.json, table.md and comparison.png, each whole; without a finished run only the first."""
    paths = [options.output / "compare.json"]
    write_json(paths[0], found)
    if not found["runs"]:
        return paths
    paths.append(options.output / "table.md")
    with written_whole(paths[1], text=True) as file:
        file.write(markdown(found))
    measures = {
        label: {
            name: [
                run["metrics"][measure]
                for run in found["runs"]
                if run["objective"] == name and measure in run["metrics"]
            ]
            for name in found["summary"]
        }
        for measure, label in shown_measures(found).items()
    }
    title = f"{found['data']} {found['level'] or ''}: a dot per seed, a bar at the mean"
    return [*paths, save_figure(comparison_figure(measures, title=title), options.output / "comparison.png")]


def run(options: CompareOptions, flags: Sequence[str] = ()) -> dict[str, Any]:
    """Do the runs that are missing and say what was found; returns what compare.json holds.

    Raises:
        UserError: data, flags or a folder that cannot be, or runs that failed, when the others have ended.
    """
    check_writable(options.output, "--output")
    runs = plan(options, flags)
    part, parts = options.part()
    mine = [run for number, run in enumerate(runs) if number % parts == part - 1]
    failures = run_all([run for run in mine if finished(run) is None], options.workers)
    found = comparison(options, runs)
    paths = write_finding(options, found)
    console = Console()
    if found["runs"]:
        # Wider than a narrow terminal rather than cut off.
        console.print(terminal_table(found), width=max(console.width, 48 + 11 * len(found["summary"])), crop=False)
    lines = [f"{len(found['runs'])} of {len(runs)} runs are finished; {len(found['missing'])} are missing"]
    console.print(literal("\n".join([*lines, *map(str, paths)])), soft_wrap=True)
    if failures:
        raise UserError(f"{len(failures)} of {len(mine)} runs failed; the first: {failures[0]}")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `itemizedclip compare`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    at = arguments.index("--") if "--" in arguments else len(arguments)
    options = read_flags(CompareOptions, arguments[:at], prog=PROG, description=DESCRIPTION)
    # A scheduler's SIGTERM ends the runs as Ctrl-C does: they save, and nothing is left running.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with reported_errors(PROG):
            run(options, arguments[at + 1 :])
    except KeyboardInterrupt:
        print(f"{PROG}: stopped; the same command goes on where it was", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
