"""Slow sites that are different sites: what a quorum does to them, with late replies dropped or buffered.

Twelve sites have one rule for their labels and four of them, which take ten times as long, another; one model for all
(fedavg) shows whose rule it learned. `python experiments/late_sites.py` prints a table of docs/lateness.md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedmeta import checkpoint, run
from fedmeta.experiment import Experiment

SITES, SLOW, ROWS, SEEDS = 12, 4, 60, 3


def delay(names: Sequence[str], round_number: int, random: np.random.Generator) -> list[float]:
    """Returns how long sites take: the first four ten times as long as the others."""
    return [float((10.0 if int(name[-2:]) < SLOW else 1.0) * (0.5 + random.random())) for name in names]


def write(folder: Path, seed: int) -> Path:
    """Writes the sites: labels by the first feature, at slow ones by the second."""
    random = np.random.default_rng(seed)
    owners = np.repeat(np.arange(SITES), ROWS)
    x = random.normal(size=(len(owners), 6)).astype(np.float32)
    y = (np.where(owners < SLOW, x[:, 1], x[:, 0]) > 0).astype(np.int64)
    np.savez(folder / "sites.npz", x=x, y=y, site=owners)
    return folder / "sites.npz"


def main() -> None:
    """Prints accuracy at fast and at slow sites, simulated seconds, and in how many rounds each kind took part."""
    ways = {
        "all are waited for": ["server.quorum=12"],
        "quorum 0.67, late ones dropped": ["server.quorum=0.67"],
        "quorum 0.67, late ones buffered": ["server.quorum=0.67", "server.late=buffer", "server.staleness=20"],
        "asynchronous, every 4 replies": ["server.quorum=4", "server.late=buffer", "server.staleness=60"],
    }
    print("| way | fast sites | slow sites | seconds of a round | rounds of a slow site / of a fast one |")
    print("|---|---|---|---|---|")
    for name, keys in ways.items():
        figures = []
        for seed in range(SEEDS):
            with tempfile.TemporaryDirectory() as folder:
                data = write(Path(folder), seed)
                settings = [f"data.path={data}", "data.source=npz", "data.new_sites=0", f"runtime.seed={seed}"]
                settings += [
                    "learner.name=fedavg",
                    "model.name=logistic",
                    "server.rounds=60",
                    "server.sites_per_round=0",
                ]
                settings += ["evaluation.every=0", "evaluation.local_baseline=none", "tracking.uri=none"]
                settings += [f"tracking.folder={folder}/runs", f"runtime.delay={__name__}:delay", "runtime.threads=1"]
                result = run(Experiment().with_overrides([*settings, "learner.local_epochs=1", *keys]))
                state, _ = checkpoint.newest(result.folder)
            scores, parts = result.sites["global_accuracy"].to_numpy(), np.array(state.took_part)
            clock = float(state.lateness["clock"]) / 60
            share = parts[:SLOW].mean() / max(parts[SLOW:].mean(), 1e-9)
            figures.append((scores[SLOW:].mean(), scores[:SLOW].mean(), clock, share))
        mean = np.mean(figures, axis=0)
        print(f"| {name} | {mean[0]:.3f} | {mean[1]:.3f} | {mean[2]:.1f} | {mean[3]:.2f} |", flush=True)


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(Path(__file__).parent))
    from late_sites import main as run_all

    run_all()
