#!/usr/bin/env python3
"""The fault table of docs/reliability.md, made anew: every test of tests/training/test_faults.py in its long version.

    python benchmarks/faults.py                 all of them, half an hour on two cores
    python benchmarks/faults.py -k killed       those whose name holds a word

Needs the `dev` extra; full disks, read-only folders and small shared memory need the right to mount (root in a
container), and are shown as skipped without.
"""

from __future__ import annotations

import inspect
import os
import platform
import sys
from pathlib import Path

os.environ["ITEMIZEDCLIP_FAULTS"] = "long"

import pytest
import torch

TESTS = Path(__file__).resolve().parents[1] / "tests" / "training" / "test_faults.py"


class Table:
    """What pytest finds, as rows."""

    def __init__(self) -> None:
        self.said: dict[str, tuple[str, str]] = {}
        self.rows: list[str] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            fault, _, wanted = (inspect.getdoc(getattr(item, "function", None)) or item.name).partition("\n")
            name = item.name.partition("[")[2].rstrip("]")
            self.said[item.nodeid] = (f"{fault} ({name})" if name else fault, " ".join(wanted.split()))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
            fault, wanted = self.said[report.nodeid]
            found = {"passed": "as wanted", "failed": "**not as wanted**", "skipped": "skipped"}[report.outcome]
            self.rows.append(f"| {fault} | {wanted} | {found} | {report.duration:.0f} |")


def main(arguments: list[str]) -> int:
    """Run the tests and print the table."""
    table = Table()
    code = pytest.main([str(TESTS), "-p", "no:cacheprovider", *arguments], plugins=[table])
    print(f"\nPyTorch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores\n")
    print("\n".join(["| fault | wanted | found | seconds |", "|---|---|---|---|", *table.rows]))
    return int(code)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
