"""Ways of searching: what is tried next, and which trials are given up early. What of Optuna differs here, and why."""

from __future__ import annotations

import importlib.util
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from fedmeta.errors import FedmetaError
from fedmeta.randomness import generator
from fedmeta.tuning.space import Choices, Dimension, Range, Settings

STRANGERS = 5
"""So many trials come to their end before the median pruner asks, and are drawn at random before a model is fitted."""
RUNGS = 6
"""A trial is judged after each sixth of its rounds, where it may be pruned."""


def distributions(space: Sequence[Dimension]) -> dict[str, BaseDistribution]:
    """Returns a space as Optuna describes it."""
    return {each.key: _distribution(each) for each in space}


def _distribution(dimension: Dimension) -> BaseDistribution:
    if isinstance(dimension, Choices):
        return CategoricalDistribution(dimension.values)
    if dimension.whole:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def sampler_of(name: str, seed: int, workers: int) -> BaseSampler:
    """Returns a way of searching.

    Args:
        name: "random", "grid" (whose points stand in the queue: it draws none), "tpe", "gp" or "cmaes".
        seed: Key of its draws.
        workers: How many trials run side by side.

    Raises:
        FedmetaError: It needs a package that is not there.
    """
    if name == "cmaes" and importlib.util.find_spec("cmaes") is None:
        raise FedmetaError("--sampler cmaes needs the package cmaes: pip install cmaes")
    if name == "gp" and importlib.util.find_spec("scipy") is None:
        raise FedmetaError("--sampler gp needs the package scipy: pip install scipy")
    makers: dict[str, Callable[[int], BaseSampler]] = {
        "random": lambda key: RandomSampler(seed=key),
        "grid": lambda key: RandomSampler(seed=key),
        "tpe": lambda key: TPESampler(seed=key, n_startup_trials=2 * STRANGERS, constant_liar=workers > 1),
        "gp": lambda key: GPSampler(seed=key, n_startup_trials=STRANGERS, warn_independent_sampling=False),
        "cmaes": lambda key: CmaEsSampler(seed=key, warn_independent_sampling=False),
    }
    return DrawnByNumber(makers[name], seed)


SAMPLERS = ("grid", "random", "tpe", "gp", "cmaes")


class DrawnByNumber(BaseSampler):
    """A sampler whose draws depend on its seed, the trial's number and the trials before, and on nothing else.

    Optuna's own begin their stream of random numbers anew in every process: a search that goes on would try its first
    points again, and two processes side by side the same ones.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        self._make, self._seed = make, seed
        self._number, self._own = -1, make(0)

    def _sampler(self, trial: FrozenTrial) -> BaseSampler:
        if trial.number != self._number:
            key = int(generator(self._seed, "search", trial.number).integers(2**31))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                self._number, self._own = trial.number, self._make(key)
        return self._own

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Returns what is drawn together."""
        return self._sampler(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Returns values that are drawn together."""
        return self._sampler(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Returns a value that is drawn alone."""
        return self._sampler(trial).sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Does what the sampler does before a trial."""
        self._sampler(trial).before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Does what the sampler does after a trial."""
        self._sampler(trial).after_trial(study, trial, state, values)


def grid(space: Sequence[Dimension], count: int, seed: int) -> list[Settings]:
    """Returns the points of a grid of at most `count` points, in a drawn order.

    Every choice is taken; numbers get as many levels, evenly spaced in the middles of equal parts of their range, as
    the rest of the budget carries.

    Raises:
        FedmetaError: The choices alone are more than `count`.
    """
    levels = [len(each.values) if isinstance(each, Choices) else 1 for each in space]
    if math.prod(levels) > count:
        raise FedmetaError(f"--sampler grid: the choices alone make {math.prod(levels)} points; give --trials as many")
    while True:
        growing = [
            place
            for place, each in enumerate(space)
            if _may_grow(each, levels[place]) and math.prod(levels) // levels[place] * (levels[place] + 1) <= count
        ]
        if not growing:
            break
        levels[min(growing, key=lambda place: (levels[place], place))] += 1
    axes = [[each.at((level + 0.5) / many) for level in range(many)] for each, many in zip(space, levels, strict=True)]
    points = [dict(zip((each.key for each in space), point, strict=True)) for point in itertools.product(*axes)]
    order: list[int] = generator(seed, "grid").permutation(len(points)).tolist()
    return [points[place] for place in order]


def _may_grow(each: Dimension, levels: int) -> bool:
    return isinstance(each, Range) and (not each.whole or levels < each.high - each.low + 1)


def pruner_of(name: str, rounds: int) -> BasePruner:
    """Returns what gives trials up early: "median" (worse than half of the others so far), "hyperband", or "none"."""
    first = interval(rounds)
    if name == "median":
        # Trials that got so far are the better ones, so that half of the good would go each time it is asked: it is
        # asked twice, after a third and two thirds of the rounds.
        third = 2 * first
        return MedianPruner(n_startup_trials=STRANGERS, n_warmup_steps=third, interval_steps=third)
    if name == "hyperband":
        return HyperbandPruner(min_resource=first, max_resource=max(rounds, first + 1), reduction_factor=3)
    return NopPruner()


def interval(rounds: int) -> int:
    """Returns after how many rounds a trial is judged each time, where it may be given up."""
    return max(1, int(np.ceil(rounds / RUNGS)))


PRUNERS = ("median", "hyperband", "none")
