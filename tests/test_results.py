"""The numbers of docs/results.md are those of the JSON files in benchmarks/, and these follow from their runs."""

from __future__ import annotations

import re
import runpy
from dataclasses import asdict
from pathlib import Path

import pytest

from itemizedclip.evaluation.comparison import summarise
from itemizedclip.runtime.files import read_json

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
FILES = sorted((ROOT / "benchmarks").glob("compare_*.json"))


def test_tables_are_made_from_the_json_files():
    filled = runpy.run_path(str(ROOT / "benchmarks" / "results.py"))["filled"]
    assert filled(PAGE) == PAGE, "run python benchmarks/results.py"
    changed = re.sub(r"\| 0\.\d{3}", "| 9.999", PAGE)
    assert changed != PAGE
    assert filled(changed) == PAGE


def test_every_file_is_shown_and_every_table_has_its_file():
    assert FILES
    assert re.findall(r"<!-- table of benchmarks/(\S+) -->", PAGE) == [path.name for path in FILES]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_summaries_follow_from_the_runs(path):
    found = read_json(path, holding="a comparison")
    scores: dict[str, dict[int, dict[str, float]]] = {}
    for run in found["runs"]:
        scores.setdefault(run["objective"], {})[run["seed"]] = run["metrics"]
    expected = summarise(scores, found["reference"])
    assert found["summary"] == {
        name: {measure: asdict(summary) for measure, summary in of_measure.items()}
        for name, of_measure in expected.items()
    }
    # Means and differences once more, by hand.
    for name, own in scores.items():
        for measure, summary in found["summary"][name].items():
            values = [metrics[measure] for metrics in own.values()]
            assert summary["mean"] == pytest.approx(sum(values) / len(values))
            base = scores[found["reference"]]
            if name != found["reference"] and all(measure in metrics for metrics in base.values()):
                pairs = [metrics[measure] - base[seed][measure] for seed, metrics in own.items()]
                assert summary["difference"] == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_command_of_the_page_is_that_of_the_runs(path):
    """What follows -- in the page's command stands in every run's command."""
    section = PAGE.partition(f"<!-- table of benchmarks/{path.name} -->")[0].rpartition("```bash\n")[2]
    flags = section.partition("```")[0].partition(" -- ")[2].split()
    assert flags
    for run in read_json(path, holding="a comparison")["runs"]:
        assert " ".join(flags) in run["command"]
