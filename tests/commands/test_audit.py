"""What scripts/audit.py says of pip-audit's reports."""

from __future__ import annotations

import importlib.util

from commands import ROOT


def script():
    spec = importlib.util.spec_from_file_location("audit", ROOT / "scripts" / "audit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_verdict_on_an_environment():
    verdict = script().verdict
    own = {"name": "itemizedclip", "skip_reason": "editable"}
    sound = {"name": "a", "version": "1", "vulns": []}
    bad = {"name": "b", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.1", "3.0"]}]}
    assert verdict({"dependencies": [own, sound]}) == (["audited 1 of 1 packages: 0 known vulnerabilities"], 0)
    assert verdict({"dependencies": [sound, bad]}) == (
        ["audited 2 of 2 packages: 1 known vulnerabilities", "b 2: PYSEC-1, mended in 2.1, 3.0"], 1,
    )  # fmt: skip
    unreachable = {"name": "a", "version": "1", "skip_reason": "not found on PyPI"}
    for report in ({"dependencies": [own, unreachable]}, {"dependencies": [], "failure": "no route to host"}):
        (line,), status = verdict(report)
        assert line.startswith("not audited: PyPI's advisories cannot be reached (no")
        assert status == 0
