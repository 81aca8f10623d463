"""What runs of several objectives tell about them: means, deviations, and paired differences with intervals.

Runs of one seed share data, initial weights and order, so objectives are compared within seeds: the difference to the
reference is taken seed by seed, and its interval is Student's t over those differences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

Scores = Mapping[int, Mapping[str, float]]
"""Seed → measure → value, of one objective."""

CONFIDENCE = 0.95
"""Of all intervals."""


@dataclass(frozen=True)
class Summary:
    """One measure of one objective over seeds.

    Attributes:
        count: seeds with a value.
        mean: over them.
        deviation: of a sample (n − 1); None with one seed.
        difference: mean of the paired differences to the reference, over seeds that both have; None for the reference
            itself and where it lacks the measure.
        low: lower end of the interval of `difference`; None with fewer than two pairs.
        high: its upper end.
    """

    count: int
    mean: float
    deviation: float | None
    difference: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def differs(self) -> bool:
        """Whether the interval of the difference leaves out 0."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Student's interval of the mean of independent values; None for fewer than two.

    Args:
        values: at least two of them to tell anything.
        confidence: share of such intervals that hold the true mean, when values are normally distributed.
    """
    if len(values) < 2:
        return None
    mean, half = math.fsum(values) / len(values), _deviation(values) / math.sqrt(len(values))
    half *= float(stats.t.ppf((1 + confidence) / 2, len(values) - 1))
    return mean - half, mean + half


def _deviation(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def summarise(scores: Mapping[str, Scores], reference: str) -> dict[str, dict[str, Summary]]:
    """Objective → measure → summary, in the order of `scores`; a measure that no run of an objective has is left out.

    Args:
        scores: objective → its scores.
        reference: objective that the others are compared with; may lack runs, then nothing is compared.
    """
    base = scores.get(reference, {})
    return {
        name: {
            measure: _summary(own, {} if name == reference else base, measure)
            for measure in dict.fromkeys(key for metrics in own.values() for key in metrics)
        }
        for name, own in scores.items()
    }


def _summary(own: Scores, base: Scores, measure: str) -> Summary:
    values = {seed: metrics[measure] for seed, metrics in sorted(own.items()) if measure in metrics}
    count = len(values)
    mean = math.fsum(values.values()) / count
    deviation = _deviation(list(values.values())) if count > 1 else None
    pairs = [value - base[seed][measure] for seed, value in values.items() if measure in base.get(seed, {})]
    difference = math.fsum(pairs) / len(pairs) if pairs else None
    low, high = t_interval(pairs) or (None, None)
    return Summary(count, mean, deviation, difference, low, high)
