"""Pictures of a comparison: each learner's difference from the baseline with its interval."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fedmeta.tracking import pictures
from fedmeta.tracking.run_page import COLOURS


def differences(table: pd.DataFrame, baseline: str, score: str) -> Figure:
    """Draws each learner's paired difference from the baseline and its interval, the best learner on top.

    Args:
        table: One row per learner, the best first: learner, personalized, difference, low, high.
        baseline: What the others are held against.
        score: "accuracy" or "rmse".
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
    what = "gain in accuracy" if score == "accuracy" else "fall of rmse"
    pictures.entitle(axes, f"New sites: each learner against {baseline}", f"{what} (paired by site; 95 % interval)", "")
    return figure


def save(table: pd.DataFrame, baseline: str, score: str, folder: Path) -> Path:
    """Draws the differences into a folder; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "differences.png"
    differences(table, baseline, score).savefig(path)
    return path
