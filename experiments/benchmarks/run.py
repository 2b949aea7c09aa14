"""Runs every benchmark and prints one Markdown page; `make bench` does this.

    python experiments/benchmarks/run.py [--quick] [--pfl-python PYTHON] [--out FOLDER]

Writes the page as results.md and every single time as results.json, beside each other.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine

HERE = Path(__file__).parent

PARTS = {
    "engines": "One cohort, the engines against each other (milliseconds)",
    "rounds": "One whole round, against Flower's simulation and pfl",
    "overhead": "What a round costs outside the learner",
    "scale": "By size",
}
"""The scripts, in the order in which they run, and what their tables are called."""

SHORT = {
    "engines": ["--repeats", "7"],
    "rounds": ["--blocks", "2", "--rounds", "80", "--flower-rounds", "4"],
    "overhead": ["--rounds", "100"],
    "scale": ["--repeats", "1", "--rounds", "10"],
}
"""Options under which everything takes a quarter of an hour: medians of few runs."""

QUICK = {
    "engines": ["--repeats", "1"],
    "rounds": ["--blocks", "1", "--rounds", "5", "--flower-rounds", "1"],
    "overhead": ["--rounds", "10"],
    "scale": ["--repeats", "1", "--rounds", "2"],
}
"""Options under which everything is run but nothing is measured well."""


def run_part(name: str, options: list[str]) -> tuple[str, Any]:
    """Runs one script; returns its tables and what it wrote as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, str(HERE / f"{name}.py"), *options, "--json", str(path)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        figures = json.loads(path.read_text())
    # Before its table a script prints what it ran on, which the page states once.
    return done.stdout[done.stdout.index("| ") :].strip(), figures


def options_of(name: str, options: argparse.Namespace) -> list[str]:
    """Returns a script's options."""
    own = QUICK[name] if options.quick else SHORT[name] if options.short else []
    threads = [] if name == "overhead" else ["--threads", str(options.threads)]
    pfl = ["--pfl-python", options.pfl_python] if name == "rounds" and options.pfl_python else []
    return [*own, *threads, *pfl]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="run everything once, in minutes; measures nothing well")
    parser.add_argument("--short", action="store_true", help="fewer runs of everything: a quarter of an hour")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--pfl-python", default="", help="an interpreter that has pfl")
    parser.add_argument("--only", choices=list(PARTS), action="append", help="only this part; may be repeated")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for results.md and results.json")
    options = parser.parse_args()
    described = machine.describe(options.threads)
    page = ["# Benchmarks", machine.markdown(("machine", ""), described.items())]
    results: dict[str, Any] = {"machine": described, "quick": options.quick, "short": options.short}
    for name in options.only or PARTS:
        print(name, file=sys.stderr)
        tables, results[name] = run_part(name, options_of(name, options))
        page += [f"## {PARTS[name]}", tables]
    text = "\n\n".join(page) + "\n"
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.md").write_text(text)
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
