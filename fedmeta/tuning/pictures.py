"""Pictures of a search: scores by trial, what each key does to them, and which keys matter."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter
from numpy.typing import NDArray

from fedmeta.experiment import Scalar
from fedmeta.tracking.pictures import COLOURS, FAINT, GROUND, INK, LOSS, entitle, figure_of, finish
from fedmeta.tuning.results import Search
from fedmeta.tuning.space import Choices, Dimension

DONE, BEST = COLOURS["new"], COLOURS["training"]
STRATEGIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
"""Of Okabe and Ito (2008), as everywhere."""
MANY_DECADES = 1.7


def history(search: Search) -> Figure:
    """Draws every trial's score in its order, and the best so far."""
    figure, axes = figure_of(7.0, 4.2)
    ended = [(each.number, each.score) for each in search.attempts if each.state == "done" and each.score is not None]
    pruned = [
        (each.number, each.score) for each in search.attempts if each.state == "pruned" and each.score is not None
    ]
    failed = [each.number for each in search.attempts if each.state == "failed"]
    numbers, scores = zip(*ended, strict=True)
    axes.scatter(numbers, scores, s=26, color=DONE, zorder=3, label="to its end")
    if pruned:
        numbers, scores = zip(*pruned, strict=True)
        axes.scatter(numbers, scores, s=26, facecolor=GROUND, edgecolor=FAINT, zorder=2, label="pruned")
    if failed:
        floor = min(score for _, score in ended)
        axes.scatter(failed, [floor] * len(failed), marker="x", s=26, color=LOSS, label="failed")
    curve = search.best_so_far()
    start = ended[0][0]
    axes.step(range(start, start + len(curve)), curve, where="post", color=BEST, linewidth=1.8, label="best so far")
    if search.own and search.own.score is not None:
        axes.axhline(search.own.score, color=INK, linewidth=0.9, linestyle="--", label="as it was")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    entitle(axes, f"Search by {search.plan.sampler}", "trial", f"{search.score.name} on validation sites")
    return finish(figure, axes)


def settings(search: Search) -> Figure:
    """Draws the scores against each key's value; of trials that were given up, the last ones on their way."""
    space = search.plan.space
    figure, _ = figure_of(min(3.2 * len(space), 14.0) + 0.8, 3.4, columns=len(space))
    pruned = [each for each in search.attempts if each.state == "pruned" and each.score is not None]
    for place, (axes, each) in enumerate(zip(figure.axes, space, strict=True)):
        for trials, face in ((pruned, GROUND), (search.done, DONE)):
            scores = np.array([attempt.score for attempt in trials])
            where = _places(each, [attempt.settings[each.key] for attempt in trials])
            axes.scatter(where, scores, s=22, facecolor=face, edgecolor=FAINT if trials is pruned else DONE, alpha=0.8)
        axes.scatter(where[:1], scores[:1], s=70, facecolor="none", edgecolor=BEST, linewidth=2)
        _scale(axes, each)
        entitle(axes, each.key, "", "" if place else f"{search.score.name}, validation sites")
    return figure


def _places(dimension: Dimension, values: Sequence[Scalar]) -> NDArray[np.float64]:
    """Returns where values stand on the axis of their key: numbers where they are, choices side by side."""
    if isinstance(dimension, Choices):
        return np.array([dimension.values.index(value) for value in values], dtype=np.float64)
    return np.array(values, dtype=np.float64)


def _scale(axes: Axes, dimension: Dimension) -> None:
    if isinstance(dimension, Choices):
        axes.set_xticks(range(len(dimension.values)), [str(value) for value in dimension.values], fontsize=8)
        axes.set_xlim(-0.5, len(dimension.values) - 0.5)
    elif dimension.log:
        axes.set_xscale("log")
        decades = math.log10(dimension.high / dimension.low)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < MANY_DECADES else (1,)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(dimension.low / 1.2, dimension.high * 1.2)


def importance(search: Search) -> Figure:
    """Draws what share of the scores' variance each key explains."""
    figure, axes = figure_of(7.0, 1.4 + 0.34 * max(len(search.importance), 2))
    keys = list(search.importance)[::-1]
    axes.barh(np.arange(len(keys)), [search.importance[key] for key in keys], color=DONE, height=0.6)
    axes.set_yticks(np.arange(len(keys)), keys, fontsize=9)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(visible=False, axis="y")
    entitle(axes, "Which keys matter", "share of the scores' variance (functional ANOVA)", "")
    return figure


def save(search: Search, folder: Path) -> list[Path]:
    """Draws all pictures of a search into a folder; returns the files."""
    drawings: dict[str, Callable[[Search], Figure]] = {"history": history, "settings": settings}
    if search.importance:
        drawings["importance"] = importance
    files = []
    for name, draw in drawings.items():
        path = folder / f"{name}.png"
        draw(search).savefig(path)
        files.append(path)
    return files


def strategies(curves: Mapping[str, NDArray[np.float64]], metric: str) -> Figure:
    """Draws the best score so far against the trial: the mean over seeds, and a band from the worst to the best seed.

    Args:
        curves: Each way's curves [seeds, trials].
        metric: What settings are scored by.
    """
    figure, axes = figure_of(7.0, 4.4)
    for colour, (name, own) in zip(itertools.cycle(STRATEGIES), curves.items(), strict=False):
        trials = np.arange(1, own.shape[1] + 1)
        axes.step(trials, own.mean(axis=0), where="post", color=colour, linewidth=2, label=name)
        low, high = own.min(axis=0), own.max(axis=0)
        axes.fill_between(trials, low, high, step="post", color=colour, alpha=0.13, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    seeds = max(len(own) for own in curves.values())
    entitle(axes, f"Best so far: mean and range of {seeds} seeds", "trials", f"{metric} on validation sites")
    return finish(figure, axes)
