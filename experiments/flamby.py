"""FLamby's protocol on the four hospitals (Ogier du Terrail et al. 2022): its rows, its features, logistic regression.

    python experiments/flamby.py [../shared/data/heart/heart.npz] [--seeds 5]

Keeps the 740 rows that are complete in the first ten columns, codes chest pain and resting ECG as indicators (13
features), and tests on a third of each hospital's rows. `pooled` is a gradient step on all hospitals' train rows
each round: what FedAvg comes to with one local step on all rows, and sites weighted by them. Prints a Markdown table:
accuracy on the same test rows, as the mean over hospitals and over all rows, mean and standard deviation over seeds.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

import fedmeta
from fedmeta.search.comparison_report import spread

COLUMNS = 10
INDICATORS = (2, 6)
"""Chest pain and resting ECG; the first value of each has no indicator."""

SETTINGS = [
    "data.new_sites=0",
    "data.test=0.34",
    "data.support=500",
    "data.query=500",
    "server.sites_per_round=0",
    "evaluation.every=0",
    "tracking.uri=none",
]
WAYS = {
    "fedavg": ["learner.name=fedavg", "server.rounds=50", "learner.inner_steps=20"],
    "fedavg, fine-tuned": ["learner.name=fedavg-ft", "server.rounds=50", "learner.inner_steps=20"],
    "pooled": ["learner.name=fedavg", "server.rounds=1000", "learner.inner_steps=1", "server.weighting=examples"],
    "each alone": ["learner.name=local", "server.rounds=0", "learner.inner_steps=100", "learner.inner_lr=1.0"],
}


def cut(source: Path, target: Path) -> None:
    """Writes the rows and features of the protocol."""
    arrays = np.load(source)
    x = arrays["x"][:, :COLUMNS]
    whole = ~np.isnan(x).any(axis=1)
    x = x[whole]
    parts = [np.delete(x, INDICATORS, axis=1)]
    parts += [x[:, [column]] == np.unique(x[:, column])[1:] for column in INDICATORS]
    y, site = arrays["y"][whole], arrays["site"][whole]
    np.savez(target, x=np.concatenate(parts, axis=1), y=y, site=site, site_names=arrays["site_names"])


def accuracies(path: Path, folder: str, seed: int, settings: list[str]) -> tuple[float, float]:
    """Returns the accuracy of a run as the mean over hospitals, and over all test rows."""
    own = [f"data.path={path}", f"runtime.seed={seed}", f"tracking.folder={folder}"]
    base = Path(__file__).parent / "heart.toml"
    sites = fedmeta.run(fedmeta.load_experiment(str(base), [*SETTINGS, *own, *settings])).sites
    scores = sites["personalized_accuracy"]
    return float(scores.mean()), float(np.average(scores, weights=sites["test_rows"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path, default=Path("../shared/data/heart/heart.npz"))
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flamby-") as folder:
        path = Path(folder) / "flamby.npz"
        cut(options.source, path)
        print("| way | mean over hospitals | over all test rows |\n|---|---|---|")
        for name, settings in WAYS.items():
            found = np.array([accuracies(path, folder, seed, settings) for seed in range(options.seeds)])
            means, sds = found.mean(0), found.std(0, ddof=1) if options.seeds > 1 else np.full(2, np.nan)
            print(f"| {name} | " + " | ".join(spread(*cell) for cell in zip(means, sds, strict=True)) + " |")


if __name__ == "__main__":
    main()
