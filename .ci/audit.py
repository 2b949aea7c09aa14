"""Checks what is installed against PyPI's list of known vulnerabilities; without that list it reports so and passes.

    python .ci/audit.py        what `make audit` runs: the virtual environment of that Python

pip-audit does the asking. It lives in a separate environment, for its dependencies would change those that it checks.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "build" / "audit"
PROBE = "https://pypi.org/pypi/pip/23.0/json"
ANSWERS_S = 15
SERVICE = ("--vulnerability-service", "pypi")

ACCEPTED: dict[str, str] = {}
"""Vulnerabilities that do not concern this project, by id, each with the reason."""


def main() -> int:
    """Audits; returns 1 where a vulnerability is known that a newer version mends."""
    if not list_answers():
        return skipped("PyPI's list of vulnerabilities does not answer from here")
    python = TOOL / "bin" / "python"
    try:
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(TOOL)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "pip-audit>=2.9,<3"], check=True)
    except (OSError, subprocess.CalledProcessError):
        return skipped("pip-audit cannot be installed")
    command = [str(python), "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--skip-editable"]
    command += ["--timeout", str(ANSWERS_S), *SERVICE, "--path", sysconfig.get_path("purelib")]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        report = json.loads(answer.stdout)
    except ValueError:
        return skipped(f"pip-audit did not end: {(answer.stderr.strip().splitlines() or ['it printed nothing'])[-1]}")
    known, mended = unaccepted(report, ACCEPTED)
    print("\n".join([*known, f"audit: {len(report['dependencies'])} packages, {len(known)} known vulnerabilities"]))
    return 1 if mended else 0


def list_answers() -> bool:
    """Returns whether PyPI lists vulnerabilities here: a mirror may have its packages and not its lists."""
    try:
        with urllib.request.urlopen(PROBE, timeout=ANSWERS_S) as answer:
            return "vulnerabilities" in json.load(answer)
    except (OSError, ValueError):
        return False


def unaccepted(report: dict[str, Any], accepted: dict[str, str]) -> tuple[list[str], int]:
    """Returns a line per vulnerability of a report, and how many of them a newer version mends."""
    known, mended = [], 0
    for package in report["dependencies"]:
        for entry in package.get("vulns", ()):
            if entry["id"] in accepted:
                continue
            fix = ", ".join(entry["fix_versions"])
            state = f"mended in {fix}" if fix else "open"
            known.append(f"{package['name']} {package['version']}: {entry['id']}, {state}")
            mended += bool(fix)
    return known, mended


def skipped(reason: str) -> int:
    """Reports why nothing was audited; that is no failure."""
    print(f"audit: skipped: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
