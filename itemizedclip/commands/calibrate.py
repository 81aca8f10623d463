"""The command `itemizedclip calibrate`: what the scores of a checkpoint mean, fitted on patients of their own.

itemizedclip calibrate own --data my.jsonl --classes classes.txt --checkpoint epoch_30.pt
itemizedclip calibrate ct-rate --data-root DIR --labels calibration.csv --checkpoint epoch_80.pt
itemizedclip calibrate … --not-of epoch_30.own.my.json        refuse patients of that test

NAME and its flags are those of `itemizedclip evaluate`. The result, calibration.json beside the checkpoint, is used by
evaluate (measured on other patients), report (probabilities) and the Python API (`itemizedclip.calibrated`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from itemizedclip.commands.named import load_named, split_name
from itemizedclip.evaluation.benchmark import (
    BENCHMARKS,
    BenchmarkOptions,
    Finished,
    cases_of,
    description_of,
    prompts_of,
    run_benchmark,
)
from itemizedclip.evaluation.calibration import (
    Calibration,
    FitSettings,
    Scored,
    calibration_path,
    fit_calibration,
    write_calibration,
)
from itemizedclip.evaluation.tcsim import Scoring
from itemizedclip.runtime.errors import UserError, reported_errors
from itemizedclip.runtime.files import check_writable
from itemizedclip.runtime.flags import check, read_flags
from itemizedclip.runtime.logs import literal

PROG = "itemizedclip calibrate"


@dataclass(frozen=True)
class CalibrationSettings:
    """How to calibrate."""

    method: Literal["auto", "isotonic", "platt"] = "auto"
    """Probabilities by isotonic regression or Platt's sigmoid; auto: isotonic from 1,000 cases on."""

    coverage: float = 0.9
    """Of the conformal sets, separately for cases with and without the finding."""

    sensitivities: tuple[float, ...] = (0.9, 0.95)
    """Of the operating points: for each, the largest threshold that keeps it."""

    not_of: tuple[Path, ...] = ()
    """Result files of evaluations whose patients must not be among those of the calibration, such as the test."""

    def __post_init__(self) -> None:
        check(0 < self.coverage < 1, f"--coverage is {self.coverage}; expected a number between 0 and 1, such as 0.9")
        for value in self.sensitivities:
            check(0 < value <= 1, f"--sensitivities has {value}; expected numbers above 0, at most 1")
        check(bool(self.sensitivities), "--sensitivities is empty; expected at least one, such as 0.9")

    @property
    def fit(self) -> FitSettings:
        """What fitting takes."""
        return FitSettings(self.method, self.coverage, self.sensitivities)


def calibrate(settings: CalibrationSettings, options: BenchmarkOptions) -> dict[str, float]:
    """Score the calibration cases, fit, write calibration.json beside the checkpoint; returns the benchmark's measures.

    Raises:
        UserError: a benchmark without classes, too few patients, or patients of a test.
    """
    check_writable(calibration_path(options.checkpoint).parent, "--checkpoint")
    # An earlier calibration, such as of these very patients, is replaced.
    chosen = replace(options.for_calibration(), use_calibration=False)
    return run_benchmark(chosen, lambda finished: _fit(settings, finished))


def _fit(settings: CalibrationSettings, finished: Finished) -> None:
    cases, subject, evaluator = finished.cases, finished.subject, finished.benchmark.evaluator
    if cases is None:
        raise UserError(f"{finished.benchmark.name}: has no classes to calibrate; give classes with labels (--classes)")
    scoring: Scoring = getattr(evaluator, "scorings", ("tcsim",))[0]
    scored = Scored(
        evaluation=finished.benchmark.name,
        checkpoint_sha256=subject.identity["checkpoint_sha256"],
        precision=subject.identity["precision"],
        scoring=scoring,
        normalise_tokens=bool(evaluator.facts.get("normalise_tokens", False)),
        prompts=prompts_of(evaluator),
    )
    tests = [(path, cases_of(path)) for path in settings.not_of]
    for path, test in tests:
        shared = sorted(set(test.patients) & set(cases.patients))
        if shared:
            raise UserError(
                f"{path}: {len(shared):,} of its patients are among those of the calibration ({', '.join(shared[:3])}"
                f"{', …' if len(shared) > 3 else ''}); calibrate on patients that no test has"
            )
    calibration = fit_calibration(cases, scored, settings.fit)
    path = calibration_path(finished.options.checkpoint)
    write_calibration(path, calibration)
    console = Console()
    for table in calibration_tables(calibration, len(cases)):
        console.print(table)
    for name, why in calibration.left_out.items():
        console.print(literal(f"not calibrated: {name}: {why}"), soft_wrap=True)
    console.print(literal(f"written to {path}"), soft_wrap=True)


def calibration_tables(calibration: Calibration, num_cases: int) -> list[Table]:
    """Findings and what is known of them, cross-fitted; and their thresholds."""
    compact: dict[str, Any] = {"title_justify": "left", "box": SIMPLE_HEAD, "padding": (0, 1, 0, 0)}
    patients = len(calibration.patients)
    findings = Table(title=f"Calibration on {num_cases:,} cases of {patients:,} patients; cross-fitted", **compact)
    thresholds = Table(title="Thresholds at fixed sensitivity; achieved, cross-fitted", **compact)
    for table, names in (
        (findings, ("with", "without", "method", "Brier", "error", "cov. with", "without", "undecided")),
        (thresholds, ("wanted", "threshold", "sensitivity", "specificity")),
    ):
        table.add_column("finding", no_wrap=True)
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)

    def percent(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.0f} %"

    for finding in calibration.findings:
        own = finding.quality
        cells = [f"{finding.num_positive:,}", f"{finding.num_negative:,}", finding.method, f"{own['brier']:.3f}"]
        shares = [percent(own[key]) for key in ("coverage_present", "coverage_absent", "undecided")]
        findings.add_row(literal(finding.name), *cells, f"{own['calibration_error']:.3f}", *shares)
        for point in finding.operating_points:
            cells = [percent(point.wanted_sensitivity), f"{point.threshold:.4f}", percent(point.sensitivity)]
            thresholds.add_row(literal(finding.name), *cells, percent(point.specificity))
    return [findings, thresholds]


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Entry point of `itemizedclip calibrate`; exits 2 when there is no such benchmark."""
    name, flags = split_name(argv, PROG, BENCHMARKS, "[flags]")
    kind = load_named(BENCHMARKS, name, PROG)
    fields: list[Any] = [
        (
            "how",
            Annotated[CalibrationSettings, tyro.conf.arg(name="")],
            field(default_factory=CalibrationSettings),
        ),
        ("of", Annotated[kind, tyro.conf.arg(name="")]),
    ]
    both = make_dataclass("CalibrateOptions", fields, frozen=True, kw_only=True)
    both.__doc__ = "How to calibrate, on what."
    prog = f"{PROG} {name}"
    with reported_errors(prog):
        options: Any = read_flags(
            both, flags, prog=prog, description=f"Calibrate the scores of: {description_of(kind)}", published=True
        )
        return calibrate(options.how, options.of)
