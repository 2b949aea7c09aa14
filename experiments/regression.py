"""Does a meta-learned start beat what a site's own rows give, for regression? Made-up federations of 42 clinics.

    python experiments/regression.py

Each clinic has 60 to 150 rows of 18 features and a score with mean 29 and standard deviation of about 11 over all rows,
and adapts on 20 rows. Local-only is ridge regression on the same rows, its strength chosen by cross-validation. Prints
the RMSE at new sites and its ratio to local-only's; results/regression.md holds what it printed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import fedmeta
from fedmeta.experiment import Experiment

CLINICS, FEATURES, MEAN, SPREAD = 42, 18, 29.0, 11.0
KINDS = ("shared", "drifting", "nonlinear", "own")
SETTINGS = (("server.rounds=100",), ("server.rounds=300",), ("server.rounds=300", "learner.inner_lr=0.05"))

Floats = NDArray[np.float64]


def clinics(kind: str) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Returns features [rows, 18], scores [rows] and each row's clinic [rows].

    Args:
        kind: "shared": common weights, a small shift of each clinic's own, and an offset; "drifting": a level of the
            clinic's own that drifts with time, and weak features, as scores of patients followed at home;
            "nonlinear": a common nonlinear map under weights close to common ones; "own": weights that are mostly the
            clinic's own.
    """
    draw = np.random.default_rng(0)
    common = draw.normal(size=FEATURES) / np.sqrt(FEATURES)
    mixing = draw.normal(size=(FEATURES, FEATURES)) / np.sqrt(FEATURES)
    features, scores, owners = [], [], []
    for clinic in range(CLINICS):
        count = int(draw.integers(60, 151))
        if kind == "drifting":
            days = np.sort(draw.uniform(0, 180, count))
            center = draw.normal(size=FEATURES)
            x = (center + 0.7 * draw.normal(size=(count, FEATURES))) @ mixing
            x[:, 0] = days / 60
            level = 0.4 * (center @ common) + 0.9 * draw.normal()
            drift = draw.normal(0, 2.5) * (days - 90) / 90 * 1.5 + 0.8 * np.sin(days / 30 + draw.uniform(0, 6))
            y = MEAN + 9 * level + drift + 0.5 * (x @ common) + 0.3 * draw.normal(size=count)
        elif kind == "nonlinear":
            x = draw.normal(size=(count, FEATURES))
            weights = common * 2 + 0.3 * draw.normal(size=FEATURES) / np.sqrt(FEATURES)
            offset, noise = 0.5 * draw.normal(), 0.2 * draw.normal(size=count)
            y = MEAN + SPREAD * (np.tanh(x @ mixing) @ weights + offset + noise)
        else:
            keep, vary, shift = (1.0, 0.3, 0.7) if kind == "shared" else (0.5, 1.0, 0.5)
            x = draw.normal(size=(count, FEATURES)) @ mixing
            weights = keep * common + vary * draw.normal(size=FEATURES) / np.sqrt(FEATURES)
            y = MEAN + SPREAD * (x @ weights + shift * draw.normal() + 0.3 * draw.normal(size=count))
        features.append(x)
        scores.append(y)
        owners.append(np.full(count, clinic))
    return np.concatenate(features), np.concatenate(scores), np.concatenate(owners)


def main() -> None:
    """Runs maml under each setting on each kind of federation."""
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            x, y, site = clinics(kind)
            path = Path(folder) / f"{kind}.npz"
            np.savez(path, x=x, y=y, site=site)
            for settings in SETTINGS:
                usual = ["data.source=npz", f"data.path={path}", "tracking.uri=none", f"tracking.folder={folder}"]
                experiment = Experiment().with_overrides([*usual, "evaluation.every=0", *settings])
                new = fedmeta.run(experiment).summary["new_sites"]
                before, after, alone = (new[state]["mean"] for state in ("global", "personalized", "local_only"))
                ratio = f"{before:.2f} {after:.2f} {alone:.2f} ratio {after / alone:.2f}"
                print(f"{kind:<10} {', '.join(settings):<46} {ratio}", flush=True)


if __name__ == "__main__":
    main()
