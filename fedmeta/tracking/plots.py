"""Plots of a run, drawn from its evaluations: pure functions from frames to matplotlib figures.

Frames are those of `fedmeta.evaluation.sites_frame`. Colors are Okabe and Ito's (2008), which differ to every eye, on a
solid light ground that also stands on a dark page. Nothing uses pyplot: no display is needed and no state is left.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from fedmeta.problems.metric import Metric, gain_label
from fedmeta.tables import number
from fedmeta.tracking.metrics import latest, worst_first

CARD_NAME = "sites_card"
FOLDER = "pictures"
"""The folder of a run's folder that holds its plots, and the pictures that its problem drew."""
DOTS_PER_INCH = 200
CARD = (12.0, 4.2)
"""Inches of a picture in MLflow's card of pictures, which is wide and low."""
NAMED_SITES = 60
LONGEST_NAME = 28
GROUND, INK, FAINT = "#FAFAF8", "#222222", "#8C8C8C"
COLOURS = {"new": "#0072B2", "training": "#E69F00", "validation": "#009E73"}
HARMED = "#D55E00"
LineStyle = Literal["-", ":", "--"]


def save(sites: pd.DataFrame, score: Metric, folder: Path) -> list[Path]:
    """Draws all plots of a run into a folder as NAME.png, the ranking of sites first; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    return [write(draw(sites, score), folder / f"{name}.png") for name, draw in plots_of(sites).items()]


def write(figure: Figure, path: Path) -> Path:
    """Writes a figure as a PNG file; returns the file."""
    with warnings.catch_warnings():
        # Names of sites may hold letters that the font lacks.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(path)
    return path


def plots_of(sites: pd.DataFrame) -> dict[str, Callable[[pd.DataFrame, Metric], Figure]]:
    """Returns the plots that show something: gains against rows only where sites differ in rows."""
    return {name: draw for name, draw in PLOTS.items() if name != "gain_by_rows" or sites["rows"].nunique() > 1}


def own_pictures(folder: Path) -> list[Path]:
    """Returns the PNG files of a run's pictures that its problem drew."""
    return [path for path in sorted(folder.glob("*.png")) if path.stem not in (*PLOTS, CARD_NAME)]


# The plots


def site_ranking(sites: pd.DataFrame, score: Metric) -> Figure:
    """Draws each site's score before and after adapting, the best on top; a band by rank where sites are too many."""
    ranked = worst_first(defined_rows(latest(sites), score))
    return _band(ranked, score) if len(ranked) > NAMED_SITES else _dumbbells(ranked, score)


def site_card(sites: pd.DataFrame, score: Metric) -> Figure:
    """Draws `site_ranking` lying down, as wide and low as MLflow's card for it, the best site on the left."""
    ranked = worst_first(defined_rows(latest(sites), score))
    if len(ranked) > NAMED_SITES:
        return _band(ranked, score, CARD)
    ranked = ranked.iloc[::-1].reset_index(drop=True)
    figure, axes = new_figure(*CARD)
    before, after = ranked[f"global_{score.name}"].to_numpy(), ranked[f"personalized_{score.name}"].to_numpy()
    places = np.arange(len(ranked))
    axes.vlines(places, before, after, color=_stroke_colors(ranked, "#BDBDBD"), linewidth=3, zorder=1)
    axes.scatter(places, before, s=36, facecolor=GROUND, edgecolor=FAINT, linewidth=1.5, zorder=2)
    axes.scatter(places, after, s=52, color=[COLOURS[kind] for kind in ranked["kind"]], zorder=3)
    names = [_short(name) for name in ranked["site"].astype(str)]
    crowded = len(names) > 12 or any(len(name) > 90 / max(len(names), 1) for name in names)
    axes.set_xticks(places, names, fontsize=9, parse_math=False, rotation=90 if crowded else 0)
    _mark_new(axes.get_xticklabels(), ranked)
    axes.set_xlim(-0.8, max(len(ranked), 3) - 0.2)
    axes.grid(visible=False, axis="x")
    set_titles(axes, _ranking_title(ranked), "", score.label)
    return finish(figure, axes, _ranking_handles(ranked) if len(ranked) else [])


def gain_by_rows(sites: pd.DataFrame, score: Metric) -> Figure:
    """Draws how much each site gains against how many rows it has to train on: do small sites lose?"""
    scored = defined_rows(latest(sites), score)
    figure, axes = new_figure(7.0, 4.4)
    for kind, part in _by_kind(scored):
        size = 30 if len(scored) <= NAMED_SITES else 12
        axes.scatter(
            part["rows"], part["gain"], s=size, color=COLOURS[kind], label=_label(kind), edgecolor=GROUND, linewidth=0.3
        )
    axes.axhline(0, color=INK, linewidth=0.8)
    if len(scored):
        rows = scored["rows"]
        if rows.min() > 0 and rows.max() > 10 * rows.min():
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_locator(NullLocator())
        low, _ = axes.get_ylim()
        axes.axhspan(min(low, 0), 0, color=HARMED, alpha=0.08, linewidth=0)
        axes.set_ylim(bottom=low)
    title = f"Gain against rows: {_harmed(scored)} of {len(scored)} sites harmed"
    set_titles(axes, title, "train rows at the site", gain_label(score))
    return finish(figure, axes)


def adaptation(sites: pd.DataFrame, score: Metric) -> Figure:
    """Draws the score against the inner step: mean over sites, and the middle 80 % of them as a band."""
    figure, axes = new_figure(7.0, 4.4)
    for kind, part in _by_kind(defined_rows(latest(sites), score)):
        scores = np.ma.masked_invalid(_by_step(part["steps"]))
        steps = np.flatnonzero(~scores.mask.all(axis=0)) if scores.mask.ndim else np.arange(scores.shape[1])
        columns = [scores[:, step].compressed() for step in steps]
        mean = [column.mean() for column in columns]
        axes.plot(steps, mean, color=COLOURS[kind], marker="o", markersize=4, label=_label(kind))
        low, high = ([np.percentile(column, share) for column in columns] for share in (10, 90))
        axes.fill_between(steps, low, high, color=COLOURS[kind], alpha=0.15, linewidth=0)
        for edge in (low, high):
            axes.plot(steps, edge, color=COLOURS[kind], linewidth=0.8, alpha=0.7)
    for name, value, style in rivals(latest(sites), score):
        axes.axhline(value, color=INK, linestyle=style, linewidth=1.0, label=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    each = sites.get("step_evaluations")
    if each is not None:
        # A step of a method that samples is no step of another's: evaluations compare with a classical method's.
        taken = int(each.max())
        above = axes.secondary_xaxis("top", functions=(partial(np.multiply, taken), partial(np.multiply, 1 / taken)))
        above.set_xlabel("evaluations of the objective", fontsize=8, color=INK)
        above.tick_params(labelsize=7)
    set_titles(axes, "Adapting: mean and middle 80 % of sites", "inner step (0 = global)", score.label)
    return finish(figure, axes)


def by_round(sites: pd.DataFrame, score: Metric) -> Figure:
    """Draws scores over rounds, per kind of site: personalized, its worst 10 %, and global."""
    figure, axes = new_figure(7.0, 4.4)
    scored = defined_rows(sites, score)
    kinds = [kind for kind, _ in _by_kind(scored)]
    marker = "o" if scored["round"].nunique() < 30 else ""
    lines: tuple[tuple[str, Callable[[pd.Series], float], LineStyle, str], ...] = (
        ("personalized", lambda values: float(values.mean()), "-", "personalized"),
        ("personalized", lambda values: _worst_decile(values, score), ":", "its worst 10 %"),
        ("global", lambda values: float(values.mean()), "--", "global"),
    )
    for kind, part in _by_kind(scored):
        for state, statistic, style, _ in lines:
            values = part.groupby("round")[f"{state}_{score.name}"].agg(statistic)
            axes.plot(values.index, values, linestyle=style, color=COLOURS[kind], marker=marker, markersize=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    set_titles(axes, f"{score.name[:1].upper()}{score.name[1:]} over rounds", "round", score.label)
    handles = [Line2D([], [], color=COLOURS[kind], label=_label(kind)) for kind in kinds]
    handles += [Line2D([], [], color=FAINT, linestyle=style, label=label) for _, _, style, label in lines]
    return finish(figure, axes, handles if kinds else [])


def heat_map(sites: pd.DataFrame, score: Metric) -> Figure:
    """Draws every site's personalized score in every evaluation: who gets better, stays behind, or swings.

    A row per site, the best at the end on top, each beginning with the color of its kind. The scale is Nunez et al.'s
    (2018) "cividis", which looks alike to every eye.
    """
    finite = sites.assign(value=sites[f"personalized_{score.name}"].replace([np.inf, -np.inf], np.nan))
    table = finite.pivot_table(index="site", columns="round", values="value").dropna(how="all")
    named = len(table) <= NAMED_SITES
    figure, axes = new_figure(7.0, 1.8 + (0.17 * max(len(table), 6) if named else 4.2))
    set_titles(axes, f"Personalized {score.label}, site by site", "round", "" if named else f"{len(table)} sites")
    if table.empty:
        return finish(figure, axes)
    table = table.sort_values(table.columns[-1], ascending=not score.higher_is_better, kind="stable")
    kinds = sites.drop_duplicates("site").set_index("site")["kind"][table.index].to_numpy()
    colors = "cividis" if score.higher_is_better else "cividis_r"
    cells = axes.imshow(table.to_numpy(), aspect="auto", cmap=colors, interpolation="nearest")
    for kind in [kind for kind in COLOURS if kind in kinds]:
        rows = np.flatnonzero(kinds == kind)
        places, size = np.full(len(rows), -0.75), 16 if named else 6
        axes.scatter(places, rows, marker="s", s=size, linewidth=0, color=COLOURS[kind], label=_label(kind))
    axes.set_xlim(-1, table.shape[1] - 0.5)
    axes.grid(visible=False)
    shown = np.unique(np.linspace(0, table.shape[1] - 1, min(12, table.shape[1])).astype(int))
    axes.set_xticks(shown, [str(table.columns[place]) for place in shown])
    names = [_short(str(name)) for name in table.index] if named else []
    axes.set_yticks(range(len(names)), names, fontsize=7, parse_math=False)
    figure.colorbar(cells, ax=axes, shrink=0.8, pad=0.02).ax.tick_params(labelsize=8, colors=INK)
    return finish(figure, axes)


PLOTS: dict[str, Callable[[pd.DataFrame, Metric], Figure]] = {
    "sites": site_ranking,
    "gain_by_rows": gain_by_rows,
    "adaptation": adaptation,
    "rounds": by_round,
    "heat_map": heat_map,
}


def _dumbbells(ranked: pd.DataFrame, score: Metric) -> Figure:
    figure, axes = new_figure(7.0, 1.6 + 0.21 * max(len(ranked), 3))
    before, after = ranked[f"global_{score.name}"].to_numpy(), ranked[f"personalized_{score.name}"].to_numpy()
    places = np.arange(len(ranked))
    axes.hlines(places, before, after, color=_stroke_colors(ranked, "#BDBDBD"), linewidth=2.2, zorder=1)
    colors = [COLOURS[kind] for kind in ranked["kind"]]
    axes.scatter(before, places, s=24, facecolor=GROUND, edgecolor=FAINT, linewidth=1.3, zorder=2)
    axes.scatter(after, places, s=32, color=colors, zorder=3)
    axes.set_yticks(places, [_short(name) for name in ranked["site"].astype(str)], fontsize=8, parse_math=False)
    _mark_new(axes.get_yticklabels(), ranked)
    axes.set_ylim(-0.8, max(len(ranked), 3) - 0.2)
    axes.grid(visible=False, axis="y")
    set_titles(axes, _ranking_title(ranked), score.label, "")
    return finish(figure, axes, _ranking_handles(ranked) if len(ranked) else [])


def _mark_new(labels: Sequence[Text], ranked: pd.DataFrame) -> None:
    for label, kind in zip(labels, ranked["kind"], strict=True):
        if kind == "new":
            label.set(color=COLOURS["new"], fontweight="bold")


def _ranking_handles(ranked: pd.DataFrame) -> list[Line2D]:
    handles = [
        Line2D([], [], color=COLOURS[kind], marker="o", linewidth=0, label=f"personalized, {_label(kind)}")
        for kind, _ in _by_kind(ranked)
    ]
    handles.append(Line2D([], [], color=FAINT, marker="o", markerfacecolor=GROUND, linewidth=0, label="global"))
    # What is not drawn has no entry.
    harmed = [Line2D([], [], color=HARMED, linewidth=2.2, label="harmed")] if (ranked["gain"] < 0).any() else []
    return handles + harmed


def _band(ranked: pd.DataFrame, score: Metric, size: tuple[float, float] = (7.0, 4.6)) -> Figure:
    groups = list(_by_kind(ranked))
    figure, first = new_figure(*size, columns=len(groups))
    for axes, (kind, part) in zip(figure.axes, groups, strict=True):
        before, after = part[f"global_{score.name}"].to_numpy(), part[f"personalized_{score.name}"].to_numpy()
        share = 100 * (np.arange(len(part)) + 0.5) / len(part)
        strokes = np.stack([np.column_stack([share, before]), np.column_stack([share, after])], axis=1)
        width = max(0.5, 150 / len(part))
        axes.add_collection(LineCollection(list(strokes), colors=_stroke_colors(part, "#C8C8C8"), linewidths=width))
        axes.scatter(share, before, s=5, color=FAINT, linewidth=0, zorder=2)
        axes.plot(share, after, color=COLOURS[kind], linewidth=2.2, zorder=3)
        axes.axvspan(0, 10, color=HARMED, alpha=0.1, linewidth=0)
        worst = f"worst 10 %: {number(_worst_decile(part[f'personalized_{score.name}'], score))}"
        box = {"facecolor": GROUND, "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
        axes.text(12, 0.03, worst, transform=axes.get_xaxis_transform(), fontsize=8, color=INK, bbox=box)
        axes.set_xlim(0, 100)
        set_titles(
            axes, f"{len(part)} {_label(kind)}", "sites, worst to best (%)", score.label if axes is first else ""
        )
    figure.suptitle(_ranking_title(ranked), x=0.02, ha="left", fontsize=11, fontweight="bold", color=INK)
    handles = [Line2D([], [], color=COLOURS[kind], linewidth=2.2, label="personalized") for kind, _ in groups[:1]]
    handles.append(Line2D([], [], color=FAINT, marker="o", markersize=3, linewidth=0, label="global, same site"))
    handles += [Line2D([], [], color=HARMED, label="harmed")] if (ranked["gain"] < 0).any() else []
    return finish(figure, first, handles)


# What they share


def _by_kind(sites: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    return ((kind, part) for kind in COLOURS if len(part := sites[sites["kind"] == kind]))


def rivals(sites: pd.DataFrame, score: Metric) -> Iterator[tuple[str, float, LineStyle]]:
    """Yields name, mean score and line of what adapting is compared with: local-only, classical method, optimum."""
    new = sites[sites["kind"] == "new"]
    own = new if len(new) else sites
    named: tuple[tuple[str, str, LineStyle], ...] = (
        ("local", "local-only", ":"),
        ("classical", "classical method", "--"),
        ("optimum", "optimum", "-"),
    )
    for column, name, style in named:
        values = own.get(f"{column}_{score.name}", pd.Series(dtype=float)).to_numpy(dtype=np.float64)
        values = values[np.isfinite(values)]
        if len(values):
            taken = own.get(f"{column}_evaluations")
            counted = f", {float(taken.mean()):.0f} evaluations" if taken is not None else ""
            yield f"{name}{counted}", float(values.mean()), style


def _by_step(steps: pd.Series) -> NDArray[np.float64]:
    """Returns scores [sites, steps + 1]; a site that took fewer steps keeps its last score."""
    longest = max(len(scores) for scores in steps)
    return np.array([[*scores, *[scores[-1]] * (longest - len(scores))] for scores in steps], dtype=np.float64)


def _worst_decile(values: pd.Series, score: Metric) -> float:
    worst = values.sort_values(ascending=score.higher_is_better)[: math.ceil(len(values) / 10)]
    return float(worst.mean())


def _harmed(sites: pd.DataFrame) -> str:
    return str(int((sites["gain"] < 0).sum()) or "none")


def _stroke_colors(sites: pd.DataFrame, usual: str) -> list[str]:
    return [HARMED if gain < 0 else usual for gain in sites["gain"]]


def _ranking_title(ranked: pd.DataFrame) -> str:
    return f"{len(ranked)} sites before and after adapting; {_harmed(ranked)} harmed"


def _label(kind: str) -> str:
    return f"{kind} sites"


def _short(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def defined_rows(sites: pd.DataFrame, score: Metric) -> pd.DataFrame:
    """Returns the rows whose scores before and after adapting are both defined and finite."""
    states = sites[[f"global_{score.name}", f"personalized_{score.name}"]].to_numpy(dtype=np.float64)
    found: pd.DataFrame = sites[np.isfinite(states).all(axis=1)]
    return found


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Axes]:
    """Returns an empty figure of the common look (inches), and its first axes."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, facecolor=GROUND, layout=layout)
    every = figure.subplots(1, columns, squeeze=False, sharey=True)
    for axes in every.flat:
        axes.set_facecolor(GROUND)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        axes.tick_params(colors=INK, labelsize=8)
        axes.grid(color="#E2E2E0", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, every[0, 0]


def set_titles(axes: Axes, title: str, x: str, y: str) -> None:
    """Sets the title and the names of both axes."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, parse_math=False)
    axes.set_xlabel(x, fontsize=9, color=INK, parse_math=False)
    axes.set_ylabel(y, fontsize=9, color=INK, parse_math=False)


def finish(figure: Figure, axes: Axes, handles: list[Line2D] | None = None) -> Figure:
    """Puts the legend below, where it hides no data."""
    entries = axes.get_legend_handles_labels()[0] if handles is None else handles
    if entries:
        figure.legend(handles=entries, loc="outside lower left", ncols=5, fontsize=8, frameon=False, labelcolor=INK)
    else:
        axes.text(0.5, 0.5, "no site has a defined score", transform=axes.transAxes, ha="center", color=INK)
    return figure
