"""Pictures of a comparison: what each learner gains over the baseline, and what it costs to send."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fedmeta.problems.metric import Metric, gain_label
from fedmeta.tracking import pictures
from fedmeta.tracking.run_page import COLOURS

LINES = 18
"""How many lines of text fit above one another in the picture of traffic."""


def differences(table: pd.DataFrame, baseline: str, score: Metric) -> Figure:
    """Draws each learner's paired difference from the baseline and its interval, the best learner on top.

    Args:
        table: One row per learner, the best first: learner, personalized, difference, low, high.
        baseline: What the others are held against.
        score: What sites are scored by.
    """
    ranked = table.iloc[::-1].reset_index(drop=True)
    figure, axes = pictures.figure_of(7.0, 1.5 + 0.32 * max(len(ranked), 3))
    places = np.arange(len(ranked))
    for place, (name, difference, low, high) in enumerate(ranked[["learner", "difference", "low", "high"]].to_numpy()):
        sure = low > 0 or high < 0
        colour = COLOURS.get(name, pictures.INK)
        axes.hlines(place, low, high, color=colour, linewidth=2.4, alpha=1 if sure else 0.45)
        filled = colour if sure else pictures.GROUND
        axes.scatter(difference, place, s=42, facecolor=filled, edgecolor=colour, linewidth=1.6, zorder=3)
    axes.axvline(0, color=pictures.INK, linewidth=0.9)
    labels = [f"{row['learner']}   {row['personalized']:.3f}" for _, row in ranked.iterrows()]
    axes.set_yticks(places, labels, fontsize=9)
    axes.set_ylim(-0.7, len(ranked) - 0.3)
    axes.grid(visible=False, axis="y")
    what = gain_label(score)
    pictures.entitle(axes, f"New sites: each learner against {baseline}", f"{what} (paired by site; 95 % interval)", "")
    return figure


def traffic(table: pd.DataFrame, score: Metric) -> Figure:
    """Draws each learner's score on new sites against the bytes that its sites sent.

    Args:
        table: One row per learner: learner, personalized, bytes_up.
        score: What sites are scored by.
    """
    figure, axes = pictures.figure_of(7.0, 4.8)
    megabytes, scores = (table["bytes_up"] / 1e6).to_numpy(), table["personalized"].to_numpy()
    colours = [COLOURS.get(name, pictures.INK) for name in table["learner"]]
    axes.scatter(megabytes, scores, s=36, color=colours, zorder=3)
    # Learners that send as much and do as well share a line of text.
    height = max(float(np.ptp(scores)) / LINES, 1e-9)
    places = list(zip(np.round(megabytes, 1), np.round(scores / height).astype(int), strict=True))
    for place in dict.fromkeys(places):
        here = [number for number, other in enumerate(places) if other == place]
        names = ", ".join(str(table["learner"].iloc[number]) for number in here)
        at = float(megabytes[here].mean()), float(place[1] * height)
        axes.annotate(names, at, (6, 0), textcoords="offset points", va="center", fontsize=8, color=pictures.INK)
    axes.set_xlim(left=0)
    axes.margins(x=0.3)
    pictures.entitle(axes, "What sites send against what new sites get", "sent by sites in a run (MB)", score.name)
    return figure


def save(table: pd.DataFrame, baseline: str, score: Metric, folder: Path) -> Path:
    """Draws the differences into a folder; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "differences.png"
    differences(table, baseline, score).savefig(path)
    return path
