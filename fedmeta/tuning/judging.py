"""The best settings against the experiment's own, on new sites that the search never saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from fedmeta.comparison import difference
from fedmeta.comparison.running import run_once
from fedmeta.experiment import Experiment
from fedmeta.problems.metric import Metric, metric_of
from fedmeta.progress import Report

BEST, OWN = "best", "own"


@dataclass(frozen=True)
class Judged:
    """Two settings on new sites, with the same seeds.

    Attributes:
        seeds: How many seeds.
        best: Mean personalized score of new sites with the best settings, over seeds.
        own: The same with the experiment's own settings.
        best_global: Mean global score with the best settings.
        own_global: The same with the experiment's own.
        difference: How much better the best settings serve new sites, paired by site and seed.
        low: The lower end of its 95 % interval over sites.
        high: The upper end.
        first: The same difference for the search's own seed alone, whose new sites the search never saw; with the
            other seeds some of the new sites had their part in it.
    """

    seeds: int
    best: float
    own: float
    best_global: float
    own_global: float
    difference: float
    low: float
    high: float
    first: tuple[float, float, float]


def judge(
    best: Experiment,
    own: Experiment,
    seeds: int,
    folder: Path,
    runtime: str,
    report: Callable[[str, int, int], Report],
) -> Judged:
    """Runs both with several seeds, unless that was done before, and sets them against one another on new sites.

    Args:
        best: The experiment with the best settings.
        own: The experiment as it is.
        seeds: How many seeds, from the experiment's upwards.
        folder: Where results are kept.
        runtime: As for `fedmeta.runtime.run`.
        report: Gives each run what takes its progress.
    """
    frames, rows, score = [], [], Metric("score", True)
    for offset in range(seeds):
        for place, (name, experiment) in enumerate({BEST: best, OWN: own}.items()):
            seed = experiment.runtime.seed + offset
            seeded = experiment.with_overrides(
                [f"runtime.seed={seed}", f"tracking.name={name} settings · {experiment.learner.name} · seed {seed}"]
            )
            take = report(f"{name} settings on new sites, seed {seed}", 2 * offset + place + 1, 2 * seeds)
            result = run_once(seeded, folder / name, runtime, take)
            frames.append(result.sites.assign(learner=name, seed=seed))
            score = metric_of(result.summary["score"])
            new = result.summary["new_sites"] if result.summary["new_sites"]["n"] else result.summary["training_sites"]
            rows.append({"name": name, "personalized": new["personalized"]["mean"], "global": new["global"]["mean"]})
    sites, means = pd.concat(frames, ignore_index=True), pd.DataFrame(rows).groupby("name").mean()
    first = sites[sites["seed"] == own.runtime.seed]
    gain, low, high = difference(sites, BEST, OWN, score, own.runtime.seed)
    return Judged(
        seeds=seeds,
        best=float(means["personalized"][BEST]),
        own=float(means["personalized"][OWN]),
        best_global=float(means["global"][BEST]),
        own_global=float(means["global"][OWN]),
        difference=gain,
        low=low,
        high=high,
        first=difference(first, BEST, OWN, score, own.runtime.seed),
    )
