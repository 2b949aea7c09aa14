"""One start for sites with labels and without: MAML with `learner.global_weight` beside MAML and FedAvg, on new sites.

    python experiments/global_weight.py experiments/har.toml [--set KEY=VALUE]... [--seeds 3] [--weights 0,0.5]

Prints a Markdown table: accuracy of new sites before and after adapting, mean and standard deviation over seeds, and
the points by which each falls short of FedAvg before and of plain MAML after.
"""

import argparse
from collections.abc import Sequence

import numpy as np

import fedmeta
from fedmeta.search.comparison_report import spread


def new_sites(file: str, overrides: Sequence[str], seeds: int) -> np.ndarray:
    """Returns the mean accuracy of new sites before and after adapting [seeds, 2]."""
    scores = []
    for seed in range(seeds):
        experiment = fedmeta.load_experiment(file, [*overrides, f"runtime.seed={seed}"])
        found = fedmeta.run(experiment).summary["new_sites"]
        scores.append([found["global"]["mean"], found["personalized"]["mean"]])
    return np.array(scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--weights", default="0,0.5")
    options = parser.parse_args()
    ways = {"fedavg-ft": ["learner.name=fedavg-ft"]}
    for weight in options.weights.split(","):
        ways[f"maml, global_weight {weight}"] = ["learner.name=maml", f"learner.global_weight={weight}"]
    found = {name: new_sites(options.file, [*options.overrides, *own], options.seeds) for name, own in ways.items()}
    before, after = found["fedavg-ft"].mean(0)[0], found["maml, global_weight 0"].mean(0)[1]
    print("| learner | before adapting | after | short of FedAvg before | short of MAML after |\n|---|---|---|---|---|")
    for name, scores in found.items():
        means, sds = scores.mean(0), scores.std(0, ddof=1) if options.seeds > 1 else np.full(2, np.nan)
        cells = [spread(mean, sd) for mean, sd in zip(means, sds, strict=True)]
        cells += [f"{100 * max(0.0, short):.1f} points" for short in (before - means[0], after - means[1])]
        print("| " + " | ".join([name, *cells]) + " |")


if __name__ == "__main__":
    main()
