"""The best settings against the experiment's own, on new sites that the search never saw."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from fedmeta.experiment import Experiment
from fedmeta.runtime import Result
from fedmeta.search.comparison import build_table
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
    results: list[Result] = []
    for offset in range(seeds):
        for name, experiment in {BASELINE: baseline, BEST: best}.items():
            seed = experiment.runtime.seed + offset
            named = f"tracking.name={name} settings · {experiment.learner.name} · seed {seed}"
            seeded = experiment.with_overrides([f"runtime.seed={seed}", named])
            take = progress(f"{name} settings on new sites, seed {seed}", len(results) + 1, 2 * seeds)
            result = run_or_load(seeded, folder / name, runtime, take)
            results.append(replace(result, summary={**result.summary, "learner": name}))
    both, first = (
        build_table(part, [BASELINE, BEST], folder, baseline.runtime.seed).table.set_index("learner").to_dict("index")
        for part in (results, results[:2])
    )
    ends = [(rows[BEST]["difference"], rows[BEST]["low"], rows[BEST]["high"]) for rows in (both, first)]
    means = [both[name][column] for column in ("personalized", "global") for name in (BEST, BASELINE)]
    return FinalEvaluation(seeds, *means, *ends)
