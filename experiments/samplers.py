"""Compares Optuna's samplers: the same space, trials and seeds for each, on validation sites of one experiment.

    python experiments/samplers.py --trials 16 --samplers grid,random,gp --seeds 3

Prints the mean best score after a quarter, half and all of the trials. Repeated, it finds earlier searches again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmeta.experiment import Experiment, load_experiment
from fedmeta.search.comparison_report import markdown_table
from fedmeta.search.optimize import tune
from fedmeta.search.results import StudyResult
from fedmeta.search.space import default_space
from fedmeta.search.study import SearchConfig

FILE = Path(__file__).parent / "digits.toml"


def searches(experiment: Experiment, sampler: str, trials: int, seeds: int) -> list[StudyResult]:
    """Returns a sampler's searches, one per seed of the search; the sites are the same for all."""
    configs = [SearchConfig(experiment, default_space(experiment), trials, sampler, seed=seed) for seed in range(seeds)]
    return [tune(config, lambda result: None) for config in configs]


def curves(results: list[StudyResult], trials: int) -> NDArray[np.float64]:
    """Returns the best score so far [seeds, trials]; a search with fewer trials keeps its last value."""
    found = [result.best_so_far() for result in results]
    return np.array([curve + [curve[-1]] * (trials - len(curve)) for curve in found])


def row(sampler: str, results: list[StudyResult], after: list[int]) -> list[str]:
    """Returns a sampler's row of the table."""
    best = curves(results, after[-1])
    states = [trial.state for result in results for trial in result.trials]
    sd = best[:, -1].std(ddof=1) if len(best) > 1 else float("nan")
    cells = [sampler, str(len(results)), f"{np.mean([len(result.trials) for result in results]):.0f}"]
    cells += [f"{best[:, count - 1].mean():.3f}" for count in after]
    return [*cells, f"{sd:.3f}", f"{states.count('pruned') / len(states):.0%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samplers", default="grid,random,qmc,tpe,gp")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    options = parser.parse_args()
    overrides = ["server.rounds=30", "tracking.uri=none", *options.set]
    experiment = load_experiment(FILE, overrides).absolute()
    after = sorted({max(1, options.trials // part) for part in (4, 2, 1)})
    rows = [
        row(sampler, searches(experiment, sampler, options.trials, options.seeds), after)
        for sampler in options.samplers.split(",")
    ]
    heads = ["sampler", "seeds", "trials", *(f"best after {count}" for count in after), "sd", "pruned"]
    print("\n".join(markdown_table(heads, rows)))


if __name__ == "__main__":
    main()
