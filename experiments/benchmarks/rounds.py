"""Times whole rounds of training, without evaluation: this system, Flower's simulation, and `pfl`.

    python experiments/benchmarks/rounds.py [--pfl-python PYTHON] [--json FILE]

A round of 64 sites with 20 + 20 rows each, a 784-128-10 network and 3 inner steps:

- maml and fedavg in the local runtime: cohort, episodes, engine, aggregation, the server's step;
- exact MAML in Flower's simulation with one site a node, written with plain Flower and torch as its guides do
  (`flower_rounds.py`), from its second round on: with the two processors a client that Flower gives it unless asked for
  something else, and with one; and this system's own apps in it, the ray runtime;
- plain federated averaging in `pfl` on the same 40 rows a site, given as ready tensors, with as many steps. An
  interpreter that has pfl is named by --pfl-python or the environment's PFL_PYTHON; this one serves where it has pfl.

Blocks of rounds of each take turns, so that what else the machine does falls on all alike. Prints a Markdown table of
medians, and writes every round's seconds as JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import machine
import numpy as np

from fedmeta import checkpoint, run
from fedmeta.experiment import Experiment

SITES, ROWS, WIDTH, HIDDEN, CLASSES, STEPS, LR = 64, 20, 784, 128, 10, 3, 0.05

EXPERIMENT = """
[data]
source = "npz"
path = "{path}"
new_sites = 0
test = 0.5
support = {rows}
query = {rows}
[model]
name = "mlp"
hidden = "{hidden}"
[learner]
name = "{learner}"
inner_steps = {steps}
inner_lr = {lr}
[server]
rounds = {rounds}
sites_per_round = {sites}
[evaluation]
every = 0
[tracking]
uri = "none"
folder = "{folder}"
[runtime]
threads = {threads}
nodes = {nodes}
"""

FLOWER = {1: "Flower's simulation, a processor a client, maml", 2: "Flower's simulation as it comes, maml"}
"""What its rounds are called, by the processors that a client is given."""

TARGETS = ((FLOWER[2], "maml", 80), (FLOWER[1], "maml", 80), ("pfl", "maml", 5), ("pfl", "fedavg", 10))
"""What the local runtime is to be faster than, with which learner, and how many times at the least."""


def write_data(folder: Path) -> tuple[Path, Path]:
    """Writes 64 sites of made-up rows: with as many test rows for us, and the train rows alone for pfl."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((CLASSES, WIDTH), dtype=np.float32)
    site = np.repeat(np.arange(SITES), 4 * ROWS)
    y = random.integers(0, CLASSES, len(site))
    x = centres[y] + 4 * random.standard_normal((len(site), WIDTH), dtype=np.float32)
    names = np.array([f"site-{number:02d}" for number in range(SITES)])
    ours, theirs = folder / "ours.npz", folder / "theirs.npz"
    np.savez(ours, x=x, y=y, site=site, site_names=names)
    first = np.arange(len(site)) % (4 * ROWS) < 2 * ROWS
    np.savez(theirs, x=x[first] / 4, y=y[first], site=site[first], hidden=HIDDEN)
    return ours, theirs


def own_rounds(data: Path, runtime: str, learner: str, rounds: int, threads: int, nodes: int = 1) -> list[float]:
    """Returns the seconds of each round but the first, from the run's own records."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"path": data, "folder": folder, "learner": learner, "rounds": rounds + 1, "threads": threads}
        settings |= {"rows": ROWS, "hidden": HIDDEN, "steps": STEPS, "lr": LR, "sites": SITES, "nodes": nodes}
        result = run(Experiment.from_toml(EXPERIMENT.format(**settings), origin="rounds.py"), runtime=runtime)
        metrics = checkpoint.newest(result.folder)[0].metrics
    return [metrics[number]["time/round_s"] for number in range(2, rounds + 2)]


def pfl_rounds(python: str, data: Path, rounds: int, threads: int) -> list[float]:
    """Returns the seconds of each of pfl's rounds but the first."""
    script = Path(__file__).with_name("pfl_rounds.py")
    command = [python, str(script), str(data), str(rounds), str(STEPS), str(LR), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    seconds: list[float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def flower_rounds(data: Path, rounds: int, processors: int) -> list[float]:
    """Returns the seconds of each round but the first of a plain Flower app, with so many processors a client."""
    script = Path(__file__).with_name("flower_rounds.py")
    command = [sys.executable, str(script), str(data), str(rounds), str(STEPS), str(LR), str(processors)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    if done.returncode or not lines:
        raise RuntimeError(f"{script.name}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    seconds: list[float] = json.loads(lines[-1])
    return seconds


def why_no_pfl(python: str) -> str:
    """Returns why pfl cannot be measured with an interpreter; the empty string where it can."""
    try:
        done = subprocess.run([python, "-c", "import pfl, torch"], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{python}: {error.strerror}"
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the seconds of every round by what ran it, and why anything was left out."""
    threads, python = options.threads, options.pfl_python or sys.executable
    skipped = {"pfl": reason} if (reason := why_no_pfl(python)) else {}
    if options.flower_rounds == 0:
        skipped["Flower's simulation"] = "--flower-rounds 0"
    runs: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = write_data(Path(folder))
        for block in range(options.blocks):
            print(f"block {block + 1} of {options.blocks}", file=sys.stderr)
            for learner in ("maml", "fedavg"):
                fresh = own_rounds(ours, "local", learner, options.rounds, threads)
                runs.setdefault(f"local runtime, {learner}", []).extend(fresh)
            if "pfl" not in skipped:
                for number in sorted({1, threads}):
                    fresh = pfl_rounds(python, theirs, options.rounds, number)
                    runs.setdefault(f"pfl, federated averaging, threads: {number}", []).extend(fresh)
            if options.flower_rounds:
                for processors, name in FLOWER.items():
                    runs.setdefault(name, []).extend(flower_rounds(theirs, options.flower_rounds, processors))
                fresh = own_rounds(ours, "ray", "maml", options.flower_rounds, 0, nodes=SITES)
                runs.setdefault("ray runtime, one site a node, maml", []).extend(fresh)
    return {"seconds": runs, "skipped": skipped, "ratios": ratios(runs)}


def ratios(runs: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Returns how many times faster the local runtime is than the best of each rival, beside what it is to be."""
    found = []
    for rival, learner, target in TARGETS:
        times = [median(seconds) for name, seconds in runs.items() if name.startswith(rival)]
        if times:
            ratio = min(times) / median(runs[f"local runtime, {learner}"])
            found.append({"learner": learner, "rival": rival, "ratio": round(ratio, 1), "target": target})
    return found


def table(result: dict[str, Any]) -> str:
    """Returns the results as Markdown."""
    rows = [
        (name, str(len(seconds)), f"{1e3 * median(seconds):.1f}", f"{1e3 * min(seconds):.1f}")
        for name, seconds in result["seconds"].items()
    ]
    rows += [(name, "-", f"not measured: {reason}", "-") for name, reason in result["skipped"].items()]
    text = machine.markdown(("round of 64 sites, 784-128-10, 3 steps", "rounds", "median ms", "fastest ms"), rows)
    lines = [
        (f"local runtime, {entry['learner']}", entry["rival"], f"{entry['ratio']} x", f"{entry['target']} x")
        for entry in result["ratios"]
    ]
    return text + "\n\n" + machine.markdown(("", "faster than", "by", "target"), lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=5, help="how many times each takes its turn")
    parser.add_argument("--rounds", type=int, default=40, help="rounds in a turn of the local runtime and of pfl")
    parser.add_argument("--flower-rounds", type=int, default=4, help="rounds in a turn of Flower; 0 leaves it out")
    parser.add_argument("--threads", type=int, default=2, help="torch threads; pfl is tried with one thread as well")
    parser.add_argument("--pfl-python", default=os.environ.get("PFL_PYTHON", ""), help="an interpreter that has pfl")
    parser.add_argument("--json", type=Path, help="where to write every round's seconds")
    options = parser.parse_args()
    described = machine.describe(options.threads)
    result = measure(options)
    print(f"{described}\n\n{table(result)}")
    if options.json:
        options.json.write_text(json.dumps({"machine": described, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
