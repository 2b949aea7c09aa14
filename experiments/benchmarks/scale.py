"""What a round and a run cost by size: population, sites a round, rows, width, steps; each run in its own process.

    python experiments/benchmarks/scale.py [--only population] [--json FILE]

Rounds of maml in the local runtime over the synthetic population, whose sites are made from their numbers. Runs of a
group take turns, so that what else the machine does falls on all alike. Seconds are medians over rounds from the
second on, from the runs' own records; memory is the most that the process held, the interpreter and torch included.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import machine

EXPERIMENT = """
[data]
source = "synthetic"
sites = {population}
rows = {site_rows}
new_sites = 0
support = {rows}
query = {rows}
[model]
name = "mlp"
hidden = "{width}"
[learner]
name = "maml"
inner_steps = {steps}
inner_lr = 0.05
[server]
rounds = {rounds}
sites_per_round = {sites}
[evaluation]
every = 0
sites = 100
[tracking]
uri = "none"
folder = "{folder}"
[runtime]
threads = {threads}
"""


@dataclass(frozen=True)
class Case:
    """One run."""

    population: int = 10_000
    sites: int = 64
    rows: int = 20
    width: int = 128
    steps: int = 3
    rounds: int = 20


BASE = Case()
GROUPS: dict[str, list[Case]] = {
    "population": [replace(BASE, population=10**power) for power in range(2, 7)],
    "population, 1 000 sites a round": [
        replace(BASE, population=10**power, sites=1000, rounds=100) for power in range(3, 7)
    ],
    "sites a round": [replace(BASE, sites=10**power) for power in range(5)],
    "rows": [replace(BASE, rows=rows) for rows in (5, 20, 80, 320)],
    "width": [replace(BASE, width=width) for width in (32, 128, 512, 2048)],
    "steps": [replace(BASE, steps=steps) for steps in (1, 3, 10, 30)],
}

CLAIM, SMALL, LARGE = "population, 1 000 sites a round", 10**3, 10**6
"""Where the cost of a round must not depend on how many sites exist."""


def run_here(case: Case, threads: int) -> dict[str, Any]:
    """Runs a case in this process; returns its seconds and its memory."""
    from fedmeta import checkpoint, run
    from fedmeta.experiment import Experiment

    held: list[float] = []
    reported: list[float] = []

    def report(progress: object) -> None:
        reported.append(time.perf_counter())
        held.append(machine.resident())

    with tempfile.TemporaryDirectory() as folder:
        settings = {**asdict(case), "site_rows": 4 * case.rows, "folder": folder, "threads": threads}
        started = time.perf_counter()
        result = run(Experiment.from_toml(EXPERIMENT.format(**settings), origin="scale.py"), report=report)
        ended = time.perf_counter()
        metrics = checkpoint.newest(result.folder)[0].metrics
    return {
        "start_s": reported[0] - started,
        "round_s": [metrics[number]["time/round_s"] for number in sorted(metrics)],
        "end_s": ended - reported[case.rounds],
        "resident_mib": max(held[1 : case.rounds + 1]),
        "most_resident_mib": machine.most_resident(),
    }


def run_apart(case: Case, threads: int) -> dict[str, Any]:
    """Runs a case in its own process."""
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case)), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case}: {done.stderr.strip().splitlines()[-1]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the figures of every case, over all its runs."""
    found = []
    for group, cases in GROUPS.items():
        if options.only not in group:
            continue
        cases = [replace(case, rounds=min(case.rounds, options.rounds or case.rounds)) for case in cases]
        runs: list[list[dict[str, Any]]] = [[] for _ in cases]
        for repeat in range(options.repeats):
            for case, figures in zip(cases, runs, strict=True):
                print(f"{group}, repeat {repeat + 1}: {case}", file=sys.stderr)
                figures.append(run_apart(case, options.threads))
        found += [
            {"group": group, **asdict(case), **summary(figures), "runs": figures}
            for case, figures in zip(cases, runs, strict=True)
        ]
    return found


def summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the medians of a case's runs, and the most memory that any of them held."""
    return {
        # Of each run the median, and of these: runs of one case may meet a machine more and less busy.
        "round_ms": 1e3 * median(median(run["round_s"][1:] or run["round_s"]) for run in runs),
        "start_s": median(run["start_s"] for run in runs),
        "end_s": median(run["end_s"] for run in runs),
        "most_resident_mib": max(run["most_resident_mib"] for run in runs),
    }


def claim(results: list[dict[str, Any]]) -> str:
    """Returns as text what the population costs a round; the empty string where that was not measured."""
    by_size = {result["population"]: result for result in results if result["group"] == CLAIM}
    if SMALL not in by_size or LARGE not in by_size:
        return ""
    small, large = by_size[SMALL], by_size[LARGE]
    return (
        f"At {LARGE:,} sites, {large['rounds']} rounds of {large['sites']} sites: a round takes "
        f"{large['round_ms'] / small['round_ms']:.2f} of its time at {SMALL:,} sites (to be within 0.90 and 1.10), "
        f"and the process held {large['most_resident_mib'] / 1024:.2f} GiB at most (to be under 2 GiB)."
    )


def table(results: list[dict[str, Any]]) -> str:
    """Returns the results as Markdown."""
    head = (
        "varied",
        "sites there",
        "sites a round",
        "rows",
        "width",
        "steps",
        "round ms",
        "ms a site",
        "start s",
        "MiB",
    )
    rows = [
        (
            result["group"],
            f"{result['population']:,}",
            min(result["sites"], result["population"]),
            f"{result['rows']}+{result['rows']}",
            result["width"],
            result["steps"],
            f"{result['round_ms']:.1f}",
            f"{result['round_ms'] / min(result['sites'], result['population']):.3f}",
            f"{result['start_s']:.1f}",
            f"{result['most_resident_mib']:.0f}",
        )
        for result in results
    ]
    return "\n\n".join(part for part in (machine.markdown(head, rows), claim(results)) if part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="how many times each case is run")
    parser.add_argument("--rounds", type=int, default=0, help="rounds of a run at most; 0 = as many as the case has")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--only", default="", help="only the groups whose name contains this")
    parser.add_argument("--json", type=Path, help="where to write every round's seconds")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_here(Case(**json.loads(options.case)), options.threads)))
        return
    described = machine.describe(options.threads)
    results = measure(options)
    print(f"{described}\n\n{table(results)}")
    if options.json:
        options.json.write_text(json.dumps({"machine": described, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
