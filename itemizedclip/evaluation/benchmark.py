"""Benchmarks: a checkpoint, a named set and its measures, from flags to results.json; one function for all of them.

A benchmark is a subclass of `BenchmarkOptions`, found by its name in the entry-point group `itemizedclip.benchmarks`.
"""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from itemizedclip.evaluation.calibration import Calibration, calibration_beside, measured_calibration
from itemizedclip.evaluation.cases import CaseScores, read_cases, write_cases
from itemizedclip.evaluation.encoding import EncodingOptions
from itemizedclip.evaluation.evaluator import ReportingEvaluator
from itemizedclip.evaluation.intervals import CONFIDENCE, intervals_of
from itemizedclip.evaluation.paired import compare_cases
from itemizedclip.evaluation.results import (
    EvaluationReport,
    Protocol,
    calibrated_table,
    differences_table,
    intervals_table,
    write_results,
)
from itemizedclip.models.factory import HUB_PREFIX, LoadedModel, given_checkpoint, load_pretrained
from itemizedclip.runtime.errors import UserError, reported_errors
from itemizedclip.runtime.files import check_writable, file_sha256, read_json
from itemizedclip.runtime.flags import at_least, loader_processes, read_flags
from itemizedclip.runtime.logs import literal, progress_bar
from itemizedclip.runtime.options import EvaluationOptions
from itemizedclip.runtime.precision import resolve_precision
from itemizedclip.runtime.processes import launch, main_first, on_main
from itemizedclip.runtime.registry import Registry

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
        loaded: the model, on the CPU.
        encoding: how images are read and encoded, in the precision that this device has.
        identity: SHA-256 of the checkpoint and precision; part of every result file, and of the key of stored scores.
    """

    loaded: LoadedModel
    encoding: EncodingOptions
    identity: Mapping[str, str]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark opened for a model.

    Attributes:
        name: of the evaluation, in the result file.
        evaluator: what measures.
        results: the result file.
        table: measures → what people read.
        facts: after the run: what the result file says besides the evaluator's facts and the subject's identity.
        protocol: see `Protocol`.
        notes: sentences to read before the numbers.
        missing: listed images or studies that are not on disk.
        figures: after the run: part of the file name → picture, written beside the result file.
    """

    name: str
    evaluator: ReportingEvaluator
    results: Path
    table: Callable[[dict[str, float]], Table]
    facts: Callable[[], Mapping[str, Any]] = field(default=dict)
    protocol: Protocol = "corrected"
    notes: Sequence[str] = ()
    missing: Sequence[str] = ()
    figures: Callable[[], Mapping[str, Figure]] = field(default=dict)


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions(EvaluationOptions, ABC):
    """What a benchmark is asked for; the first line of a subclass's docstring describes it in lists and in --help."""

    bootstrap: int = 1000
    """Resamples of whole patients for the 95 % intervals; 0: no intervals."""

    compare_with: Path | None = None
    """Result file of another evaluation of the same cases (classes): paired differences, with DeLong's test."""

    use_calibration: bool = True
    """Take the calibration.json beside the checkpoint, if there is one of these weights, and measure it here."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, bootstrap=0)

    def for_calibration(self) -> BenchmarkOptions:
        """These options, on cases that a calibration may be fitted on.

        Raises:
            UserError: they are test cases.
        """
        return self

    @abstractmethod
    def open(self, subject: Subject) -> Benchmark:
        """The benchmark for a model; every rank calls it.

        Read what may be missing or wrong by `main_first` or `on_main`, so that it is said once.

        Raises:
            FileNotFoundError, ValueError: what is missing or wrong, in one sentence.
        """


BENCHMARKS: Registry[type[BenchmarkOptions]] = Registry("itemizedclip.benchmarks", "benchmark")


def description_of(kind: type[BenchmarkOptions]) -> str:
    """One line about a benchmark."""
    return (inspect.getdoc(kind) or "").partition("\n")[0]


@dataclass(frozen=True)
class Finished:
    """An evaluation that has run.

    Attributes:
        options: with the checkpoint's file.
        subject: what was evaluated.
        benchmark: after the run.
        metrics: its measures.
        calibration: of these weights, where it is to be measured.
        other: cases of --compare-with.
    """

    options: BenchmarkOptions
    subject: Subject
    benchmark: Benchmark
    metrics: dict[str, float]
    calibration: Calibration | None = None
    other: CaseScores | None = None

    @property
    def cases(self) -> CaseScores | None:
        """Scores and labels by case, of evaluations of classes."""
        cases: CaseScores | None = getattr(self.benchmark.evaluator, "cases", None)
        return cases


def evaluate(options: BenchmarkOptions) -> dict[str, float]:
    """Load, score, print a table, write results.json; all ranks return the same numbers.

    Raises:
        CheckpointError, FileNotFoundError, ValueError, SetupError: each one sentence with its remedy.
    """
    return run_benchmark(options, _report)


def run_benchmark(options: BenchmarkOptions, finish: Callable[[Finished], None]) -> dict[str, float]:
    """Load and score; the main rank finishes. All ranks return the same numbers.

    Args:
        options: what to evaluate.
        finish: what becomes of it, such as result files.

    Raises:
        CheckpointError, FileNotFoundError, ValueError, SetupError: each one sentence with its remedy.
    """
    with launch(options.device, options.distributed) as ranks:
        checkpoint = main_first(lambda: given_checkpoint(options.checkpoint))
        if str(options.checkpoint).startswith(HUB_PREFIX) and options.output is None:
            raise UserError(f"--checkpoint {options.checkpoint}: say with --output where the results go")
        options = replace(options, checkpoint=checkpoint)
        loaded = main_first(lambda: load_pretrained(checkpoint, config=options.model, text_model=options.text_model))
        precision = resolve_precision(options.precision, ranks.device)
        encoding = EncodingOptions(
            batch_size=options.batch_size,
            num_workers=loader_processes(options.workers),
            autocast_dtype=precision.autocast_dtype,
            on_bad_sample=options.on_bad_sample,
        )
        sha256 = on_main(lambda: file_sha256(checkpoint))
        subject = Subject(loaded, encoding, {"checkpoint_sha256": sha256, "precision": precision.name})
        benchmark = options.open(subject)
        on_main(lambda: _check_results_file(benchmark.results))
        other = on_main(lambda: None if options.compare_with is None else cases_of(options.compare_with))
        calibration = on_main(lambda: _calibration(options, subject, benchmark))
        if ranks.is_main:
            for note in loaded.notes:
                logger.info("%s: %s", checkpoint, note)
            for note in benchmark.notes:
                logger.warning("%s", note)
        evaluator = benchmark.evaluator
        with progress_bar(f"Scoring {evaluator.unit}", enabled=ranks.is_main) as evaluator.on_progress:
            metrics = evaluator.run(loaded.model.to(ranks.device))
        on_main(lambda: finish(Finished(options, subject, benchmark, metrics, calibration, other)))
        return metrics


def evaluate_from_flags(
    kind: type[BenchmarkOptions], argv: Sequence[str] | None = None, *, prog: str
) -> dict[str, float]:
    """Entry point of the scripts: a benchmark by its flags, errors in one line."""
    with reported_errors(prog):
        return evaluate(read_flags(kind, argv, prog=prog, description=description_of(kind), published=True))


def _check_results_file(path: Path) -> None:
    check_writable(path.parent, "--output")
    if path.is_dir():
        raise UserError(f"{path}: results cannot be written there, it is a folder; give a file with --output")


def cases_of(results: Path) -> CaseScores:
    """The cases that a result file was made of, which lie beside it.

    Raises:
        UserError: no result file of `itemizedclip evaluate`, or one of an evaluation without classes.
    """
    values = read_json(results, holding="results of itemizedclip evaluate")
    facts = values.get("facts") if isinstance(values, dict) else None
    name = facts.get("cases") if isinstance(facts, dict) else None
    if not isinstance(name, str) or Path(name).name != name:
        raise UserError(f"{results}: names no cases; expected results of itemizedclip evaluate with classes, made anew")
    return read_cases(results.parent / name)


def _calibration(options: BenchmarkOptions, subject: Subject, benchmark: Benchmark) -> Calibration | None:
    """The calibration to measure, which must be of other patients; None where there is none, or no classes."""
    patient_names = getattr(benchmark.evaluator, "patient_names", None)
    if not options.use_calibration or not callable(patient_names):
        return None
    found = calibration_beside(options.checkpoint, subject.identity["checkpoint_sha256"])
    if found is not None:
        found.check_patients(patient_names(), where=str(benchmark.results))
    return found


def _statistics(finished: Finished) -> tuple[dict[str, Any], list[Table]]:
    """Intervals, differences and calibration: what the result file says of them, and tables."""
    metrics, cases, evaluator = finished.metrics, finished.cases, finished.benchmark.evaluator
    facts: dict[str, Any] = {}
    tables = []
    resampling = getattr(evaluator, "resampling", None)
    intervals = intervals_of(metrics, resampling, finished.options.bootstrap)
    if intervals and resampling is not None:
        patients = len(set(resampling.patients_N))
        facts["intervals"] = {
            "confidence": CONFIDENCE,
            "resamples": finished.options.bootstrap,
            "num_patients": patients,
            "of": {name: list(ends) for name, ends in intervals.items()},
        }
        tables.append(intervals_table(metrics, intervals, patients=patients))
    if finished.other is not None:
        if cases is None:
            raise UserError("--compare-with needs an evaluation of classes; this one has no labels")
        compared = compare_cases(cases, finished.other)
        facts["compared_with"] = {"results": str(finished.options.compare_with), **compared}
        tables.append(differences_table(str(finished.options.compare_with), compared))
    calibration = finished.calibration
    if calibration is not None and cases is not None:
        same = evaluator.facts.get("normalise_tokens", calibration.normalise_tokens) == calibration.normalise_tokens
        measured = measured_calibration(calibration, cases, prompts_of(evaluator)) if same else {}
        if measured:
            facts["calibrated"] = {"coverage": calibration.coverage, "findings": measured}
            tables.append(calibrated_table(measured, calibration.coverage))
        else:
            logger.warning("the calibration beside the checkpoint is of other texts or another scoring: not used")
    return facts, tables


def prompts_of(evaluator: ReportingEvaluator) -> dict[str, Sequence[str]]:
    """Class → its texts, of an evaluation of classes."""
    classes = getattr(evaluator, "classes", None)
    return dict(zip(classes.names, classes.prompts)) if classes is not None else {}


def _report(finished: Finished) -> None:
    """Write the results, show them."""
    options, subject, benchmark, metrics = finished.options, finished.subject, finished.benchmark, finished.metrics
    path = benchmark.results
    statistics, tables = _statistics(finished)
    facts = {**benchmark.evaluator.facts, **benchmark.facts(), **statistics, **subject.identity}
    if finished.cases is not None:
        of_cases = path.with_name(f"{path.name.removesuffix('.json').removesuffix('.results')}.cases.json")
        write_cases(of_cases, finished.cases)
        facts["cases"] = of_cases.name
    write_results(path, EvaluationReport(benchmark.name, benchmark.protocol, str(options.checkpoint), metrics, facts))
    written = [path]
    for part, figure in benchmark.figures().items():
        stem = path.name.removesuffix(".json").removesuffix(".results")
        written.append(path.with_name(f"{stem}.{part}.png"))
        figure.savefig(written[-1], metadata={"Software": None})
    console = Console()
    for table in (benchmark.table(metrics), *tables):
        console.print(table)
    left_out = len(benchmark.missing) + len(benchmark.evaluator.unusable)
    if left_out:
        what = f"listed {benchmark.evaluator.unit} are missing or cannot be read"
        console.print(literal(f"{left_out:,} {what}; see {path.name}"), soft_wrap=True)
    console.print(literal(f"written to {' and '.join(map(str, written))}"), soft_wrap=True)
