"""What objectives, orders and cohorts come to: `python experiments/steering.py objective digits har --seeds 3`.

Each variant trains MAML on the same sites with the same seeds. New sites are scored; differences from the first variant
are paired by seed. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from fedmeta import load_experiment, run

JUDGED = ("evaluation.validate_every=5", "evaluation.validation_sites=0.2")
VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "objective": {
        "mean": (),
        "worst": ("server.objective=worst", "server.worst_lr=0.1"),
        "cvar": ("server.objective=cvar", "server.cvar_share=0.3"),
        "q": ("server.objective=q", "server.q=1.0"),
    },
    "order": {
        "exact": (),
        "first": ("learner.order=first",),
        "auto": ("learner.order=auto", *JUDGED),
        "auto by cosine": ("learner.order=auto", "server.climb_below=0.9", *JUDGED),
    },
    "cohort": {
        "uniform": ("server.sites_per_round=6",),
        "optimal": ("server.sites_per_round=6", "server.sampling=optimal"),
        "clustered": ("server.sites_per_round=6", "server.sampling=clustered"),
        "fedvarp": ("server.sites_per_round=6", "server.variance_reduction=fedvarp"),
    },
}
QUIET = ("tracking.uri=none", "evaluation.every=0", "evaluation.local_baseline=none", "runtime.threads=1")


def main() -> None:
    """Runs every variant on the named data sets and prints their tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=VARIANTS)
    parser.add_argument("names", nargs="*", default=["digits"])
    parser.add_argument("--only", nargs="*", default=[], help="variants; the first one always runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--set", action="append", default=[], help="section.key=value, for every variant")
    parser.add_argument("--folder", default="fedmeta-runs/steering")
    chosen = parser.parse_args()
    folder = Path(__file__).parent
    first, *others = VARIANTS[chosen.what].items()
    variants = dict([first, *(each for each in others if not chosen.only or each[0] in chosen.only)])
    for name in chosen.names:
        print(f"\n{name}, {chosen.rounds} rounds, {chosen.seeds} seeds\n", flush=True)
        print(
            f"| {chosen.what} | mean | worst 10 % | worst 10 % against {first[0]} | mean against {first[0]} | seconds |"
        )
        print("|---|---:|---:|---:|---:|---:|", flush=True)
        found: dict[str, list[tuple[float, float]]] = {}
        for variant, keys in variants.items():
            seconds, notes = 0.0, list[str]()
            for seed in range(chosen.seeds):
                own = (f"runtime.seed={seed}", f"server.rounds={chosen.rounds}", f"tracking.folder={chosen.folder}")
                summary = run(load_experiment(folder / f"{name}.toml", [*QUIET, *keys, *own, *chosen.set])).summary
                score = summary["new_sites"]["personalized"]
                found.setdefault(variant, []).append((score["mean"], score["worst_decile"]))
                seconds += summary["wall_s"]
                if order := summary.get("order"):
                    notes.append(f"{order['rounds_exact']} exact, first {order['first_s']}, exact {order['exact_s']} s")
            values, base = np.array(found[variant]), np.array(found[first[0]])
            change = values - base
            cells = [f"{values[:, 0].mean():.3f}", f"{values[:, 1].mean():.3f}"]
            for column in (1, 0):
                each, error = change[:, column], change[:, column].std(ddof=1) / np.sqrt(max(1, len(change)))
                cells.append("" if variant == first[0] else f"{each.mean():+.3f} ± {error:.3f}")
            print(f"| {variant} | {' | '.join(cells)} | {seconds / chosen.seeds:.0f} |", *notes, flush=True)


if __name__ == "__main__":
    main()
