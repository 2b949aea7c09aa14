"""What each training site was worth to a run: the score with it against the score without it.

A run is a game: its players are the training sites, and what a group of them is worth is the score of a run on the
group alone, at the run's new sites and at its training sites. Two values of a site i of n come of it:

- leave-one-out, v(all) - v(all without i): what the run would lose if the site left today;
- Shapley's, the mean of v(S with i) - v(S) over the orders in which sites may join, S being those before i. Its sum
  over all sites is v(all) - v(none), which leave-one-out lacks: of two sites with the same rows each is worth nothing
  there. Orders are drawn, each with its reverse, and a pair of orders is one observation: intervals are Student's t
  over pairs (Mitchell 2022, "Sampling permutations for Shapley value estimation", antithetic sampling).

Scores are oriented so that more is better. v(none) is the score of the start that the seed draws, before any round.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmeta.checkpoint import Checkpoint
from fedmeta.errors import FedmetaError
from fedmeta.experiment import UNTRACKED, Experiment
from fedmeta.randomness import generator
from fedmeta.unlearning.retrain import finished_run, without_site

Group = frozenset[str]

GROUPS = ("new_sites", "training_sites")
"""Where a run is scored: at sites that never train, and at all the training sites of the original run."""

FILE = "values.json"
"""The values in the run's folder."""

LEVEL = 0.95
"""How often an interval covers the value, were the orders' values normal."""


@dataclass(frozen=True)
class Values:
    """The values of a run's training sites.

    Attributes:
        score: The name of the score.
        higher_is_better: Whether more of it is better; values are oriented so that more is.
        names: The training sites.
        everyone: The score of the run on all of them, by group.
        start: The score before any round, by group.
        left_out: Leave-one-out values [sites], by group.
        shapley: Mean over pairs of orders [sites], by group; NaN where no pair was finished.
        half_width: Half the width of its interval [sites], by group; NaN of fewer than two pairs.
        pairs: How many pairs of orders there were.
        runs: How many runs it took.
        seconds: The time it took.
    """

    score: str
    higher_is_better: bool
    names: tuple[str, ...]
    everyone: Mapping[str, float]
    start: Mapping[str, float]
    left_out: Mapping[str, NDArray[np.float64]]
    shapley: Mapping[str, NDArray[np.float64]]
    half_width: Mapping[str, NDArray[np.float64]]
    pairs: int
    runs: int
    seconds: float

    def to_json(self) -> dict[str, object]:
        """Returns it as what JSON holds; None for what is not known."""

        def listed(values: NDArray[np.float64]) -> list[float | None]:
            return [value if math.isfinite(value) else None for value in values.tolist()]

        return {
            "score": {"name": self.score, "higher_is_better": self.higher_is_better},
            "pairs": self.pairs,
            "runs": self.runs,
            "seconds": round(self.seconds, 3),
            "level": LEVEL,
            **{
                group: {
                    "all": self.everyone[group],
                    "none": self.start[group],
                    "sites": list(self.names),
                    "leave_one_out": listed(self.left_out[group]),
                    "shapley": listed(self.shapley[group]),
                    "half_width": listed(self.half_width[group]),
                }
                for group in self.everyone
            },
        }


def site_values(
    name: str,
    root: Path,
    *,
    pairs: int,
    workers: int,
    seconds: float = 0.0,
    overrides: Sequence[str] = (),
    code: Collection[str] = (),
    report: Callable[[str], None] = lambda line: None,
) -> Values:
    """Values a finished run's training sites.

    Args:
        name: The run's folder, that folder's name, or its MLflow id.
        root: The folder of all runs.
        pairs: How many orders to draw, each taken with its reverse; 0 = leave-one-out alone.
        workers: How many runs are computed at once, each in another process with one thread.
        seconds: After this time no further pair is begun; 0 = no limit. What is given is then of fewer pairs.
        overrides: `section.key=value` texts that change every run, such as fewer rounds: values are then of such runs.
        code: What the run may name of code that is not part of fedmeta.
        report: Takes a line on what is done.

    Raises:
        FedmetaError: There is no such run, it has one training site, or a run on some of its sites fails.
    """
    experiment, state, folder = finished_run(name, root, code)
    names = tuple(sorted(set(state.names) - set(state.new_sites) - set(state.validation_sites)))
    if len(names) < 2:
        raise FedmetaError(f"{folder}: the run has one training site: there is nothing to compare it with")
    if experiment.privacy.noise_multiplier:
        raise FedmetaError(f"{folder}: noise for privacy is larger than what one site adds: values would be noise")
    quiet = _quiet(experiment.with_overrides(overrides))
    started = time.monotonic()
    everyone = frozenset(names)
    with (
        tempfile.TemporaryDirectory() as scratch,
        _pool(workers) as pool,
    ):
        game = _Game(quiet, state, everyone, Path(scratch), pool)
        game.ask([everyone, frozenset(), *(everyone - {site} for site in names)])
        report(f"leave-one-out: {len(names) + 2} runs")
        whole, none = game.score(everyone), game.score(frozenset())
        left_out = {g: np.array([whole[g] - game.score(everyone - {site})[g] for site in names]) for g in whole}
        found: list[dict[str, NDArray[np.float64]]] = []
        orders = [_order(names, experiment.runtime.seed, number) for number in range(pairs)]
        ahead = max(1, math.ceil(2 * workers / len(names)))
        for number in range(pairs):
            if seconds and time.monotonic() - started > seconds:
                break
            for order in orders[number : number + ahead]:
                game.ask(_chain(order))
                game.ask(_chain(order[::-1]))
            forth, back = (_marginals(order, names, game) for order in (orders[number], orders[number][::-1]))
            found.append({group: (forth[group] + back[group]) / 2 for group in whole})
            report(f"pair {number + 1} of {pairs}: {game.runs} runs")
        game.cancel()
        mean, half = _estimate(found, names, whole)
        return Values(
            game.score_name, game.higher, names, whole, none, left_out, mean, half, len(found), game.runs,
            time.monotonic() - started,
        )  # fmt: skip


class _Game:
    """What groups of sites are worth: each group is run once, several at a time."""

    def __init__(
        self, experiment: Experiment, state: Checkpoint, everyone: Group, scratch: Path, pool: ProcessPoolExecutor
    ) -> None:
        self._experiment, self._state, self._everyone = experiment, state, everyone
        self._scratch, self._pool = scratch, pool
        self._asked: dict[Group, Future[tuple[dict[str, float], str, bool]]] = {}
        self.score_name, self.higher = "", True

    @property
    def runs(self) -> int:
        """How many runs are over."""
        return sum(future.done() and not future.cancelled() for future in self._asked.values())

    def ask(self, groups: Iterable[Group]) -> None:
        """Has groups run that were not."""
        for group in groups:
            if group in self._asked:
                continue
            # Without any site there is no run: the start is that of the whole run, after no round.
            experiment = without_site(self._experiment, self._state, *sorted(self._everyone - group if group else ()))
            if not group:
                server = experiment.server.model_copy(update={"rounds": 0})
                experiment = experiment.model_copy(update={"server": server})
            tracking = experiment.tracking.model_copy(update={"folder": str(self._scratch / str(len(self._asked)))})
            experiment = experiment.model_copy(update={"tracking": tracking})
            scored = without_site(self._experiment, self._state)
            sites = (tuple(self._state.new_sites), tuple(sorted(self._everyone)))
            self._asked[group] = self._pool.submit(_worth, experiment.to_toml(), scored.to_toml(), sites)

    def score(self, group: Group) -> dict[str, float]:
        """Returns a group's worth, once its run is over."""
        worth, self.score_name, self.higher = self._asked[group].result()
        return worth

    def cancel(self) -> None:
        """Begins no further run."""
        for future in self._asked.values():
            future.cancel()


def _worth(experiment: str, scored: str, sites: tuple[tuple[str, ...], ...]) -> tuple[dict[str, float], str, bool]:
    """Returns the oriented mean score of a run, by group, with the score's name and whether higher is better.

    Args:
        experiment: What to run, as TOML.
        scored: The experiment whose data hold all the sites that it is scored at.
        sites: These sites, of each of `GROUPS`.
    """
    import torch

    from fedmeta import checkpoint
    from fedmeta.runtime import run
    from fedmeta.runtime.scoring import score_at

    torch.set_num_threads(1)
    result = run(Experiment.from_toml(experiment, "experiment"))
    state, _ = checkpoint.newest(result.folder)
    found = score_at(state, Experiment.from_toml(scored, "experiment"), tuple(sorted({*sites[0], *sites[1]})))
    sign = 1.0 if found.metric.higher_is_better else -1.0
    worth = {group: sign * found.mean(set(names)) for group, names in zip(GROUPS, sites, strict=True) if names}
    return worth, found.metric.name, found.metric.higher_is_better


def _quiet(experiment: Experiment) -> Experiment:
    """Returns an experiment that is tracked nowhere and evaluates one site; who is scored is for `score_at`."""
    tracking = experiment.tracking.model_copy(update={"uri": UNTRACKED, "parent": "", "model": ""})
    evaluation = experiment.evaluation.model_copy(update={"every": 0, "local_baseline": "none", "sites": 1})
    runtime = experiment.runtime.model_copy(update={"threads": 1, "checkpoint_every": 0, "check": "off"})
    return experiment.model_copy(update={"tracking": tracking, "evaluation": evaluation, "runtime": runtime})


def _pool(workers: int) -> ProcessPoolExecutor:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def _order(names: tuple[str, ...], seed: int, number: int) -> tuple[str, ...]:
    return tuple(generator(seed, "order of sites", number).permutation(np.array(names, dtype=object)).tolist())


def _chain(order: tuple[str, ...]) -> list[Group]:
    """Returns the groups that an order of joining passes through."""
    return [frozenset(order[:length]) for length in range(len(order) + 1)]


def _marginals(order: tuple[str, ...], names: tuple[str, ...], game: _Game) -> dict[str, NDArray[np.float64]]:
    scores = [game.score(group) for group in _chain(order)]
    places = [order.index(name) for name in names]
    return {group: np.diff([score[group] for score in scores])[places] for group in scores[0]}


def _estimate(
    found: list[dict[str, NDArray[np.float64]]], names: tuple[str, ...], groups: Iterable[str]
) -> tuple[dict[str, NDArray[np.float64]], dict[str, NDArray[np.float64]]]:
    """Returns the mean over pairs and half the width of its interval, by group; NaN where there are too few."""
    from scipy.stats import t

    unknown = np.full(len(names), np.nan)
    mean, half = {}, {}
    for group in groups:
        values = np.array([each[group] for each in found])
        mean[group] = values.mean(0) if found else unknown
        factor = t.ppf((1 + LEVEL) / 2, len(found) - 1) / math.sqrt(len(found)) if len(found) > 1 else math.nan
        half[group] = factor * values.std(0, ddof=1) if len(found) > 1 else unknown
    return mean, half
