"""Objectives for the worst sites against the mean: `python experiments/objectives.py [digits har ...] [--seeds 3]`.

Each objective trains MAML on the same sites with the same seeds. New sites are scored; differences from the mean's
worst decile and mean are paired by seed. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from fedmeta import load_experiment, run

OBJECTIVES = {
    "mean": (),
    "worst": ("server.objective=worst", "server.worst_lr=0.1"),
    "cvar": ("server.objective=cvar", "server.cvar_share=0.3"),
    "q": ("server.objective=q", "server.q=1.0"),
}
QUIET = ("tracking.uri=none", "evaluation.every=0", "evaluation.local_baseline=none", "runtime.threads=1")


def main() -> None:
    """Runs every objective on the named data sets and prints their tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=["digits", "har"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--folder", default="fedmeta-runs/objectives")
    chosen = parser.parse_args()
    folder = Path(__file__).parent
    for name in chosen.names:
        print(f"\n{name}, {chosen.rounds} rounds, {chosen.seeds} seeds\n", flush=True)
        print("| objective | mean | worst 10 % | worst 10 % against mean | mean against mean | seconds |")
        print("|---|---:|---:|---:|---:|---:|", flush=True)
        found: dict[str, list[tuple[float, float]]] = {}
        for objective, keys in OBJECTIVES.items():
            seconds = 0.0
            for seed in range(chosen.seeds):
                own = (f"runtime.seed={seed}", f"server.rounds={chosen.rounds}", f"tracking.folder={chosen.folder}")
                summary = run(load_experiment(folder / f"{name}.toml", [*QUIET, *keys, *own])).summary
                score = summary["new_sites"]["personalized"]
                found.setdefault(objective, []).append((score["mean"], score["worst_decile"]))
                seconds += summary["wall_s"]
            values, base = np.array(found[objective]), np.array(found["mean"])
            change = values - base
            cells = [f"{values[:, 0].mean():.3f}", f"{values[:, 1].mean():.3f}"]
            for column in (1, 0):
                each = ", ".join(f"{value:+.3f}" for value in change[:, column])
                cells.append("" if objective == "mean" else f"{change[:, column].mean():+.3f} ({each})")
            print(f"| {objective} | {' | '.join(cells)} | {seconds / chosen.seeds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
