"""Optuna's samplers and pruners, set up so that a resumed or parallel search draws what an unbroken one does."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GPSampler,
    GridSampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.trial import FrozenTrial

from fedmeta.errors import FedmetaError
from fedmeta.experiment import Scalar
from fedmeta.randomness import generator
from fedmeta.search.space import Choices, Dimension

SAMPLERS = ("grid", "random", "qmc", "tpe", "gp", "cmaes")
PRUNERS = ("median", "hyperband", "none")
N_STARTUP_TRIALS = 5
"""Number of completed start-up trials before pruning and model-based sampling begin."""
PRUNING_INTERVALS = 6
"""A trial reports its score after each sixth of its rounds, where it may be pruned."""


def build_sampler(
    name: str, seed: int, workers: int, levels: Mapping[str, Sequence[Scalar]], places: Mapping[int, int]
) -> BaseSampler:
    """Returns a sampler.

    Args:
        name: One of `SAMPLERS`.
        seed: Key of its draws.
        workers: How many trials run in parallel.
        levels: The grid's values by key (`grid_levels`); only "grid" uses them.
        places: Each known trial's place in the search, by its number (see `PerTrialSeededSampler`).
    """
    makers: dict[str, Callable[[int], BaseSampler]] = {
        "grid": lambda key: GridSampler(levels, seed=seed),
        "random": lambda key: RandomSampler(seed=key),
        "qmc": lambda key: QMCSampler(
            qmc_type="halton", scramble=True, seed=seed, independent_sampler=RandomSampler(seed=key)
        ),
        "tpe": lambda key: TPESampler(seed=key, n_startup_trials=2 * N_STARTUP_TRIALS, constant_liar=workers > 1),
        "gp": lambda key: GPSampler(seed=key, n_startup_trials=N_STARTUP_TRIALS, warn_independent_sampling=False),
        "cmaes": lambda key: CmaEsSampler(seed=key, warn_independent_sampling=False),
    }
    return PerTrialSeededSampler(makers[name], seed, places)


class PerTrialSeededSampler(BaseSampler):
    """A sampler whose draws depend on its seed, the trial's place and the trials before, and on nothing else.

    Optuna's samplers restart their random stream in every process: a resumed search would try its first points again,
    and two processes side by side the same ones.

    Args:
        make: Builds the sampler from the key of a trial's draws.
        seed: The search's seed.
        places: Each known trial's place in the search, by its number. A repetition of an interrupted trial has the
            place of the first attempt.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int, places: Mapping[int, int]) -> None:
        self._make, self._seed, self._places = make, seed, places
        self._repetitions = len(places) - len(set(places.values()))
        self._sampler = self._build(0)

    def _build(self, key: int) -> BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return self._make(key)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Begins the trial's own random stream."""
        place = self._places.get(trial.number, trial.number - self._repetitions)
        self._sampler = self._build(int(generator(self._seed, "search", place).integers(2**31)))
        self._sampler.before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Returns what is sampled jointly."""
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Returns values that are sampled jointly."""
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Returns a value that is sampled independently."""
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)


def grid_levels(space: Sequence[Dimension], count: int) -> dict[str, list[Scalar]]:
    """Returns the values of each key of a grid of at most `count` points.

    Every choice is taken. Ranges get as many levels, in the middles of equal parts, as the rest of the budget allows.

    Raises:
        FedmetaError: The choices alone are more than `count`.
    """
    levels = [len(each.values) if isinstance(each, Choices) else 1 for each in space]
    if math.prod(levels) > count:
        raise FedmetaError(f"--sampler grid: the choices alone make {math.prod(levels)} points; give --trials as many")

    def growing(place: int) -> bool:
        each = space[place]
        if isinstance(each, Choices) or (each.whole and levels[place] > each.high - each.low):
            return False
        return math.prod(levels) // levels[place] * (levels[place] + 1) <= count

    while places := [place for place in range(len(space)) if growing(place)]:
        levels[min(places, key=lambda place: levels[place])] += 1
    return {
        each.key: list(each.values)
        if isinstance(each, Choices)
        else [each.at((level + 0.5) / many) for level in range(many)]
        for each, many in zip(space, levels, strict=True)
    }


def build_pruner(name: str, rounds: int) -> BasePruner:
    """Returns a pruner: "median" (stops trials worse than half of the others so far), "hyperband", or "none"."""
    first = report_every(rounds)
    if name == "median":
        # Trials that get this far are the better ones: pruning half of them at each report would discard good ones, so
        # that it happens only twice, after a third and two thirds of the rounds.
        third = 2 * first
        return MedianPruner(n_startup_trials=N_STARTUP_TRIALS, n_warmup_steps=third, interval_steps=third)
    if name == "hyperband":
        return HyperbandPruner(min_resource=first, max_resource=max(rounds, first + 1), reduction_factor=3)
    return NopPruner()


def report_every(rounds: int) -> int:
    """Returns the number of rounds between two reports of a trial."""
    return max(1, math.ceil(rounds / PRUNING_INTERVALS))
