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

from itemizedclip.evaluation.encoding import EncodingOptions
from itemizedclip.evaluation.evaluator import ReportingEvaluator
from itemizedclip.evaluation.results import EvaluationReport, Protocol, write_results
from itemizedclip.models.factory import LoadedModel, load_pretrained
from itemizedclip.models.weights import HUB_PREFIX, given_checkpoint
from itemizedclip.runtime.errors import UserError, reported_errors
from itemizedclip.runtime.files import check_writable, file_sha256
from itemizedclip.runtime.flags import loader_processes, read_flags
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


def evaluate(options: BenchmarkOptions) -> dict[str, float]:
    """Load, score, print a table, write results.json; all ranks return the same numbers.

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
        if ranks.is_main:
            for note in loaded.notes:
                logger.info("%s: %s", checkpoint, note)
            for note in benchmark.notes:
                logger.warning("%s", note)
        evaluator = benchmark.evaluator
        with progress_bar(f"Scoring {evaluator.unit}", enabled=ranks.is_main) as evaluator.on_progress:
            metrics = evaluator.run(loaded.model.to(ranks.device))
        on_main(lambda: _report(options, subject, benchmark, metrics))
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


def _report(options: BenchmarkOptions, subject: Subject, benchmark: Benchmark, metrics: dict[str, float]) -> None:
    """Write the results, show them."""
    path = benchmark.results
    facts = {**benchmark.evaluator.facts, **benchmark.facts(), **subject.identity}
    write_results(path, EvaluationReport(benchmark.name, benchmark.protocol, str(options.checkpoint), metrics, facts))
    written = [path]
    for part, figure in benchmark.figures().items():
        stem = path.name.removesuffix(".json").removesuffix(".results")
        written.append(path.with_name(f"{stem}.{part}.png"))
        figure.savefig(written[-1], metadata={"Software": None})
    console = Console()
    console.print(benchmark.table(metrics))
    left_out = len(benchmark.missing) + len(benchmark.evaluator.unusable)
    if left_out:
        what = f"listed {benchmark.evaluator.unit} are missing or cannot be read"
        console.print(literal(f"{left_out:,} {what}; see {path.name}"), soft_wrap=True)
    console.print(literal(f"written to {' and '.join(map(str, written))}"), soft_wrap=True)
