"""What an environment consists of (a CycloneDX SBOM), and which of it has known vulnerabilities.

    pip install -e '.[audit,radiology]'
    python scripts/audit.py itemizedclip.cdx.json

Needs the packages pip-audit and cyclonedx-bom, and for the second part PyPI's advisories: where they cannot be reached,
that is said, and it is no failure. Exit status 1: a package with a known vulnerability.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[1]
OWN = "itemizedclip"


def write_sbom(output: Path) -> None:
    """Write the packages of this environment as CycloneDX JSON, this project as what they are for."""
    pyproject = str(PROJECT / "pyproject.toml")
    command = [sys.executable, "-m", "cyclonedx_py", "environment", "--pyproject", pyproject]
    subprocess.run([*command, "--output-format", "JSON", "-o", str(output), sys.executable], check=True)


def audit() -> dict[str, Any]:
    """What pip-audit says of this environment."""
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--skip-editable"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        report: dict[str, Any] = json.loads(result.stdout)
    except ValueError:
        last = (result.stderr.strip().splitlines() or ["nothing"])[-1]
        return {"dependencies": [], "failure": last}
    return report


def verdict(report: dict[str, Any]) -> tuple[list[str], int]:
    """Lines to print, and the exit status."""
    packages = [package for package in report["dependencies"] if package["name"] != OWN]
    looked_up = [package for package in packages if "skip_reason" not in package]
    found = [
        f"{package['name']} {package['version']}: {vulnerability['id']}, mended in "
        f"{', '.join(vulnerability['fix_versions']) or 'no version yet'}"
        for package in looked_up
        for vulnerability in package["vulns"]
    ]
    if not looked_up:
        reason = report.get("failure") or (packages[0]["skip_reason"] if packages else "no package")
        return [f"not audited: PyPI's advisories cannot be reached ({reason})"], 0
    lines = [f"audited {len(looked_up)} of {len(packages)} packages: {len(found)} known vulnerabilities"]
    return lines + found, int(bool(found))


def main() -> int:
    """Write the list to the file that is named, then look its packages up."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    write_sbom(Path(sys.argv[1]))
    lines, status = verdict(audit())
    print("\n".join(lines))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
