"""Pictures of several learners beside one another: every site's score, and how it came about over the rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedmeta.search.comparison import Comparison, compared_kind
from fedmeta.tracking import pictures
from fedmeta.tracking.run_page import COLOURS, OTHER_COLOURS


def colour_of(learner: str, order: Sequence[str]) -> str:
    """Returns a learner's colour: its own in every picture, or one of the others by its place."""
    if learner in COLOURS:
        return COLOURS[learner]
    others = [name for name in order if name not in COLOURS]
    return OTHER_COLOURS[others.index(learner) % len(OTHER_COLOURS)]


def every_site(found: Comparison) -> Figure:
    """Draws each new site's personalized score under each learner, the best learner on top, with mean and global."""
    score, kind = found.score.name, compared_kind(found.sites)
    order = list(found.table["learner"])
    own = found.sites[found.sites["kind"] == kind]
    figure, axes = pictures.figure_of(6.2, 1.7 + 0.42 * len(order))
    draws = np.random.default_rng(0)
    for place, learner in enumerate(reversed(order)):
        scores = own[own["learner"] == learner]
        after, before = scores[f"personalized_{score}"].dropna(), scores[f"global_{score}"].dropna()
        heights = place + draws.uniform(-0.2, 0.2, len(after))
        colour = colour_of(learner, order)
        axes.scatter(after, heights, s=16, color=colour, alpha=0.55, linewidth=0, zorder=2)
        axes.vlines(after.mean(), place - 0.34, place + 0.34, color=colour, linewidth=3, zorder=3)
        axes.vlines(before.mean(), place - 0.34, place + 0.34, color=pictures.FAINT, linewidth=1.4, linestyle=":")
    axes.set_yticks(range(len(order)), list(reversed(order)), fontsize=9, parse_math=False)
    axes.set_ylim(-0.6, len(order) - 0.4)
    axes.grid(visible=False, axis="y")
    pictures.entitle(axes, f"{kind.capitalize()} sites under each learner", f"personalized {score}", "")
    return figure


def over_rounds(found: Comparison, histories: Mapping[str, pd.DataFrame]) -> Figure:
    """Draws the mean personalized score of new sites over the rounds, per learner, with the range over seeds.

    Args:
        found: The comparison.
        histories: Every evaluation of each of its runs, by their ids.
    """
    score, kind = found.score.name, compared_kind(found.sites)
    order = list(found.table["learner"])
    figure, axes = pictures.figure_of(6.2, 4.0)
    for learner in order:
        runs = [histories[name] for name in found.runs[found.runs["learner"] == learner]["run_id"] if name in histories]
        curves = [
            run[run["kind"] == kind].groupby("round")[f"personalized_{score}"].mean().rename(number)
            for number, run in enumerate(runs)
        ]
        if not curves:
            continue
        table = pd.concat(curves, axis=1).sort_index()
        colour = colour_of(learner, order)
        axes.plot(table.index, table.mean(axis=1), color=colour, linewidth=2, label=learner)
        axes.fill_between(table.index, table.min(axis=1), table.max(axis=1), color=colour, alpha=0.13, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    pictures.entitle(axes, f"{kind.capitalize()} sites while learning", "round", f"personalized {score}")
    figure.legend(loc="outside lower left", ncols=5, fontsize=8, frameon=False, labelcolor=pictures.INK)
    return figure
