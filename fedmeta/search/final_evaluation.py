"""The best settings against the experiment's own, on new sites that the search never saw."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from fedmeta.experiment import Experiment
from fedmeta.problems.metric import Metric, metric_of
from fedmeta.search.comparison import compared_group, difference
from fedmeta.search.runs import ProgressOf, run_or_load

BEST, BASELINE = "best", "baseline"


@dataclass(frozen=True)
class FinalEvaluation:
    """Two settings on new sites, with the same seeds.

    Attributes:
        seeds: How many seeds.
        best: Mean personalized score of new sites with the best settings, over seeds.
        baseline: The same with the experiment's own settings.
        best_global: Mean global score with the best settings.
        baseline_global: The same with the experiment's own.
        difference: How much better the best settings serve new sites, paired by site and seed, and the ends of its
            95 % interval over sites.
        first_seed: The same for the search's own seed alone, whose new sites the search never saw; with other seeds
            some of the new sites took part in it.
    """

    seeds: int
    best: float
    baseline: float
    best_global: float
    baseline_global: float
    difference: tuple[float, float, float]
    first_seed: tuple[float, float, float]


def evaluate_on_new_sites(
    best: Experiment, baseline: Experiment, seeds: int, folder: Path, runtime: str, progress: ProgressOf
) -> FinalEvaluation:
    """Runs both with several seeds, unless that was done before, and compares them on new sites.

    Args:
        best: The experiment with the best settings.
        baseline: The experiment as it is.
        seeds: How many seeds, starting at the experiment's.
        folder: Where results are kept.
        runtime: As for `fedmeta.runtime.run`.
        progress: Returns what takes each run's progress.
    """
    frames, score = [], Metric("score", True)
    means: dict[str, list[tuple[float, float]]] = {BEST: [], BASELINE: []}
    for offset in range(seeds):
        for place, (name, experiment) in enumerate({BEST: best, BASELINE: baseline}.items(), 1):
            seed = experiment.runtime.seed + offset
            named = f"tracking.name={name} settings · {experiment.learner.name} · seed {seed}"
            seeded = experiment.with_overrides([f"runtime.seed={seed}", named])
            take = progress(f"{name} settings on new sites, seed {seed}", 2 * offset + place, 2 * seeds)
            result = run_or_load(seeded, folder / name, runtime, take)
            score, group = metric_of(result.summary["score"]), compared_group(result.summary)
            frames.append(result.sites.assign(learner=name, seed=seed))
            means[name].append((group["global"]["mean"], group["personalized"]["mean"]))
    sites = pd.concat(frames, ignore_index=True)
    own_seed = sites[sites["seed"] == baseline.runtime.seed]
    (best_global, best_mean), (own_global, own_mean) = (
        np.array(values, dtype=float).mean(axis=0).tolist() for values in means.values()
    )
    return FinalEvaluation(
        seeds, best_mean, own_mean, best_global, own_global,
        difference(sites, BEST, BASELINE, score, baseline.runtime.seed),
        difference(own_seed, BEST, BASELINE, score, baseline.runtime.seed),
    )  # fmt: skip
