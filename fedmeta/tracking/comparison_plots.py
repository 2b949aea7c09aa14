"""Plots of several learners on the same sites: differences, traffic, every site, and scores over rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedmeta.problems.metric import Metric, gain_label
from fedmeta.tables import number
from fedmeta.tracking import plots
from fedmeta.tracking.description import COLOURS, OTHER_COLOURS

LINES = 18
"""How many lines of text fit above one another in the plot of traffic."""


def differences(table: pd.DataFrame, baseline: str, score: Metric) -> Figure:
    """Draws each learner's paired difference from the baseline and its interval, the best learner on top.

    Args:
        table: One row per learner, the best first: learner, personalized, difference, low, high.
        baseline: What the others are compared with.
        score: The score.
    """
    ranked = table.iloc[::-1].reset_index(drop=True)
    figure, axes = plots.new_figure(7.0, 1.5 + 0.32 * max(len(ranked), 3))
    for place, (name, difference, low, high) in enumerate(ranked[["learner", "difference", "low", "high"]].to_numpy()):
        significant = low > 0 or high < 0
        color = color_of(name, list(table["learner"]))
        axes.hlines(place, low, high, color=color, linewidth=2.4, alpha=1 if significant else 0.45)
        filled = color if significant else plots.GROUND
        axes.scatter(difference, place, s=42, facecolor=filled, edgecolor=color, linewidth=1.6, zorder=3)
    axes.axvline(0, color=plots.INK, linewidth=0.9)
    labels = [f"{row['learner']}   {number(row['personalized'])}" for _, row in ranked.iterrows()]
    axes.set_yticks(range(len(ranked)), labels, fontsize=9, parse_math=False)
    axes.set_ylim(-0.7, len(ranked) - 0.3)
    axes.grid(visible=False, axis="y")
    x = f"{gain_label(score)} (paired by site; 95 % interval)"
    plots.set_titles(axes, f"New sites: each learner against {baseline}", x, "")
    return figure


def traffic(table: pd.DataFrame, score: Metric) -> Figure:
    """Draws each learner's score on new sites against the bytes that its sites sent.

    Args:
        table: One row per learner: learner, personalized, bytes_up.
        score: The score.
    """
    table = table[np.isfinite(table["personalized"])].reset_index(drop=True)
    figure, axes = plots.new_figure(7.0, 4.8)
    megabytes, scores = (table["bytes_up"] / 1e6).to_numpy(), table["personalized"].to_numpy()
    axes.scatter(
        megabytes, scores, s=36, color=[color_of(n, list(table["learner"])) for n in table["learner"]], zorder=3
    )
    # Learners that send as much and do as well share a line of text.
    # Halved, for the difference of two finite numbers may not be one.
    height = max(2 * (float(np.ptp(scores / 2)) / LINES), 1e-9) if len(scores) else 1.0
    with np.errstate(over="ignore"):
        levels = np.clip(np.round(scores / height), -1e9, 1e9).astype(int)
    places = list(zip(np.round(megabytes, 1), levels, strict=True))
    for place in dict.fromkeys(places):
        here = [index for index, other in enumerate(places) if other == place]
        names = ", ".join(str(table["learner"].iloc[index]) for index in here)
        at = float(megabytes[here].mean()), float(place[1] * height)
        axes.annotate(names, at, (6, 0), textcoords="offset points", va="center", fontsize=8, color=plots.INK)
    axes.set_xlim(left=0)
    axes.margins(x=0.3)
    plots.set_titles(axes, "Traffic against score on new sites", "sent by sites in a run (MB)", score.label)
    return figure


def every_site(sites: pd.DataFrame, order: Sequence[str], kind: str, score: Metric) -> Figure:
    """Draws each site's personalized score under each learner, the best learner on top, with mean and global mean.

    Args:
        sites: Final evaluations, with the column learner.
        order: The learners, the best first.
        kind: The kind of sites to draw.
        score: The score.
    """
    own = sites[sites["kind"] == kind]
    figure, axes = plots.new_figure(6.2, 1.7 + 0.42 * len(order))
    draws = np.random.default_rng(0)
    for place, learner in enumerate(reversed(order)):
        scores = plots.defined_rows(own[own["learner"] == learner], score)
        after, before = scores[f"personalized_{score.name}"], scores[f"global_{score.name}"]
        heights = place + draws.uniform(-0.2, 0.2, len(after))
        color = color_of(learner, order)
        axes.scatter(after, heights, s=16, color=color, alpha=0.55, linewidth=0, zorder=2)
        if len(after):
            axes.vlines(after.mean(), place - 0.34, place + 0.34, color=color, linewidth=3, zorder=3)
            axes.vlines(before.mean(), place - 0.34, place + 0.34, color=plots.FAINT, linewidth=1.4, linestyle=":")
    axes.set_yticks(range(len(order)), list(reversed(order)), fontsize=9, parse_math=False)
    axes.set_ylim(-0.6, len(order) - 0.4)
    axes.grid(visible=False, axis="y")
    plots.set_titles(axes, f"{kind.capitalize()} sites under each learner", f"personalized {score.label}", "")
    return figure


def over_rounds(histories: Mapping[str, Sequence[pd.DataFrame]], kind: str, score: Metric) -> Figure:
    """Draws the mean personalized score over the rounds, per learner, with the range over seeds.

    Args:
        histories: Every evaluation of each run, by learner, the best learner first.
        kind: The kind of sites to draw.
        score: The score.
    """
    figure, axes = plots.new_figure(6.2, 4.0)
    for learner, runs in histories.items():
        if not runs:
            continue
        curves = [
            run[run["kind"] == kind].groupby("round")[f"personalized_{score.name}"].mean().rename(seed)
            for seed, run in enumerate(runs)
        ]
        table = pd.concat(curves, axis=1).sort_index().replace([np.inf, -np.inf], np.nan)
        color = color_of(learner, list(histories))
        axes.plot(table.index, table.mean(axis=1), color=color, linewidth=2, label=learner)
        axes.fill_between(table.index, table.min(axis=1), table.max(axis=1), color=color, alpha=0.13, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    plots.set_titles(axes, f"{kind.capitalize()} sites while learning", "round", f"personalized {score.label}")
    return plots.finish(figure, axes)


def color_of(learner: str, order: Sequence[str]) -> str:
    """Returns a learner's color: the same in every plot, or one of the others by its place."""
    if learner in COLOURS:
        return COLOURS[learner]
    others = [name for name in order if name not in COLOURS]
    return OTHER_COLOURS[others.index(learner) % len(OTHER_COLOURS)]
