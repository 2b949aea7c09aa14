"""Pictures of a run, drawn from its evaluations: pure functions from frames to matplotlib figures.

Frames are those of `fedmeta.evaluation.sites_frame`. Colours are Okabe and Ito's (2008), which differ to every eye, on
a solid light ground that also stands on a dark page. Nothing uses pyplot: no display is needed and no state is left.
"""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from fedmeta.evaluation import GROUPS, NEW, TRAINING, summarize, summarize_scores
from fedmeta.problems.metric import gain_label, score_of
from fedmeta.tracking.run_page import latest, worst_first

DOTS_PER_INCH = 200
NAMED_SITES = 60
LONGEST_NAME = 28
GROUND, INK, FAINT = "#FAFAF8", "#222222", "#8C8C8C"
COLOURS = {NEW: "#0072B2", TRAINING: "#E69F00", "validation": "#009E73"}
LOSS = "#D55E00"
LineStyle = Literal["-", ":", "--"]
LINES: tuple[tuple[str, str, LineStyle, str], ...] = (
    ("personalized", "mean", "-", "personalized"),
    ("personalized", "worst_decile", ":", "its worst tenth"),
    ("global", "mean", "--", "global"),
)


def save(sites: pd.DataFrame, folder: Path) -> list[Path]:
    """Draws all pictures of a run into `folder`, as NAME.png.

    Args:
        sites: every evaluation, one row per site each.
        folder: is created where it is missing.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, draw in PICTURES.items():
        path = folder / f"{name}.png"
        with warnings.catch_warnings():
            # Names of sites may hold letters that the font lacks.
            warnings.filterwarnings("ignore", message="Glyph")
            draw(sites).savefig(path)
        files.append(path)
    return files


def site_ranking(sites: pd.DataFrame) -> Figure:
    """Draws each site's score before and after adapting, the best on top; a band by rank where sites are too many."""
    ranked = _judged(latest(sites))
    return _band(ranked) if len(ranked) > NAMED_SITES else _dumbbells(ranked)


def gain_by_rows(sites: pd.DataFrame) -> Figure:
    """Draws how much each site gains against how many rows it has to train on: do small sites lose?"""
    judged = _judged(latest(sites))
    figure, axes = figure_of(7.0, 4.4)
    for kind, part in _groups(judged):
        size = 30 if len(judged) <= NAMED_SITES else 12
        axes.scatter(
            part["rows"], part["gain"], s=size, color=COLOURS[kind], label=_label(kind), edgecolor=GROUND, linewidth=0.3
        )
    axes.axhline(0, color=INK, linewidth=0.8)
    losing = int((judged["gain"] < 0).sum())
    if len(judged):
        rows = judged["rows"]
        if rows.min() > 0 and rows.max() > 10 * rows.min():
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_locator(NullLocator())
        low, _ = axes.get_ylim()
        axes.axhspan(min(low, 0), 0, color=LOSS, alpha=0.08, linewidth=0)
        axes.set_ylim(bottom=low)
    entitle(
        axes,
        f"Gain against rows: {losing or 'none'} of {len(judged)} sites lose",
        "train rows at the site",
        _gain_label(sites),
    )
    return finish(figure, axes)


def adaptation(sites: pd.DataFrame) -> Figure:
    """Draws the score against the inner step: mean over sites, and the middle 80 % of them as a band."""
    judged = _judged(latest(sites))
    figure, axes = figure_of(7.0, 4.4)
    for kind, part in _groups(judged):
        scores = _by_step(part["steps"])
        steps = np.arange(scores.shape[1])
        axes.plot(steps, np.nanmean(scores, axis=0), color=COLOURS[kind], marker="o", markersize=4, label=_label(kind))
        low, high = np.nanpercentile(scores, [10, 90], axis=0)
        axes.fill_between(steps, low, high, color=COLOURS[kind], alpha=0.15, linewidth=0)
        for edge in (low, high):
            axes.plot(steps, edge, color=COLOURS[kind], linewidth=0.8, alpha=0.7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    entitle(axes, "Adapting: mean and middle 80 % of sites", "inner step (0 = global)", score_of(sites).name)
    return finish(figure, axes)


def by_round(sites: pd.DataFrame) -> Figure:
    """Draws scores over rounds: personalized, its worst tenth, and global, for new and for training sites."""
    figure, axes = figure_of(7.0, 4.4)
    rounds = sorted(set(sites["round"].tolist()))
    score = score_of(sites)
    summaries = [summarize(sites[sites["round"] == number], [score]) for number in rounds]
    marker = "o" if len(summaries) < 30 else ""
    kinds = [kind for kind, _ in _groups(_judged(sites)) if kind in GROUPS]
    for kind in kinds:
        for when, statistic, style, _ in LINES:
            values = [summary[GROUPS[kind]][when][statistic] for summary in summaries]
            axes.plot(rounds, _numbers(values), style, color=COLOURS[kind], marker=marker, markersize=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    entitle(axes, f"{score.name.capitalize()} over rounds", "round", score.name)
    handles = [Line2D([], [], color=COLOURS[kind], label=_label(kind)) for kind in kinds]
    handles += [Line2D([], [], color=FAINT, linestyle=style, label=label) for _, _, style, label in LINES]
    return finish(figure, axes, handles if kinds else [])


def heat_map(sites: pd.DataFrame) -> Figure:
    """Draws every site's personalized score in every evaluation: who gets better, stays behind, or swings.

    A row per site, the best at the end on top, each beginning with the colour of its group. The scale is Nunez et al.'s
    (2018) "cividis", which looks alike to every eye.
    """
    metric = score_of(sites)
    score = metric.name
    table = sites.pivot_table(index="site", columns="round", values=f"personalized_{score}").dropna(how="all")
    named = len(table) <= NAMED_SITES
    figure, axes = figure_of(7.0, 1.8 + (0.17 * max(len(table), 6) if named else 4.2))
    entitle(axes, f"Personalized {score}, site by site", "round", "" if named else f"{len(table)} sites")
    if table.empty:
        return finish(figure, axes)
    table = table.sort_values(table.columns[-1], ascending=not metric.higher_is_better, kind="stable")
    kinds = sites.drop_duplicates("site").set_index("site")["kind"][table.index].to_numpy()
    colours = "cividis" if metric.higher_is_better else "cividis_r"
    cells = axes.imshow(table.to_numpy(), aspect="auto", cmap=colours, interpolation="nearest")
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


PICTURES: dict[str, Callable[[pd.DataFrame], Figure]] = {
    "sites": site_ranking,
    "gain_by_rows": gain_by_rows,
    "adaptation": adaptation,
    "rounds": by_round,
    "heat_map": heat_map,
}


def _dumbbells(ranked: pd.DataFrame) -> Figure:
    score = score_of(ranked).name
    figure, axes = figure_of(7.0, 1.6 + 0.21 * max(len(ranked), 3))
    before, after = ranked[f"global_{score}"].to_numpy(), ranked[f"personalized_{score}"].to_numpy()
    places = np.arange(len(ranked))
    widths = np.where(ranked["gain"] < 0, LOSS, "#BDBDBD")
    axes.hlines(places, before, after, color=list(widths), linewidth=2.2, zorder=1)
    colours = [COLOURS[kind] for kind in ranked["kind"]]
    axes.scatter(before, places, s=24, facecolor=GROUND, edgecolor=FAINT, linewidth=1.3, zorder=2)
    axes.scatter(after, places, s=32, color=colours, zorder=3)
    axes.set_yticks(places, [_short(name) for name in ranked["site"].astype(str)], fontsize=8, parse_math=False)
    for label, kind in zip(axes.get_yticklabels(), ranked["kind"], strict=True):
        if kind == NEW:
            label.set(color=COLOURS[NEW], fontweight="bold")
    axes.set_ylim(-0.8, max(len(ranked), 3) - 0.2)
    axes.grid(visible=False, axis="y")
    entitle(axes, _ranking_title(ranked), score, "")
    handles = [
        Line2D([], [], color=COLOURS[kind], marker="o", linewidth=0, label=f"personalized, {_label(kind)}")
        for kind, _ in _groups(ranked)
    ]
    handles.append(Line2D([], [], color=FAINT, marker="o", markerfacecolor=GROUND, linewidth=0, label="global"))
    handles.append(Line2D([], [], color=LOSS, linewidth=2.2, label="made worse"))
    return finish(figure, axes, handles if len(ranked) else [])


def _band(ranked: pd.DataFrame) -> Figure:
    score = score_of(ranked).name
    groups = list(_groups(ranked))
    figure, first = figure_of(7.0, 4.6, columns=len(groups))
    for axes, (kind, part) in zip(figure.axes, groups, strict=True):
        before, after = part[f"global_{score}"].to_numpy(), part[f"personalized_{score}"].to_numpy()
        share = 100 * (np.arange(len(part)) + 0.5) / len(part)
        strokes = np.stack([np.column_stack([share, before]), np.column_stack([share, after])], axis=1)
        stroke_colours = np.where(part["gain"] < 0, LOSS, "#C8C8C8")
        axes.add_collection(
            LineCollection(list(strokes), colors=list(stroke_colours), linewidths=max(0.5, 150 / len(part)))
        )
        axes.scatter(share, before, s=5, color=FAINT, linewidth=0, zorder=2)
        axes.plot(share, after, color=COLOURS[kind], linewidth=2.2, zorder=3)
        axes.axvspan(0, 10, color=LOSS, alpha=0.1, linewidth=0)
        worst = summarize_scores(part[f"personalized_{score}"], score_of(ranked))["worst_decile"]
        worst = np.nan if worst is None else worst
        box = {"facecolor": GROUND, "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
        axes.text(
            12, 0.03, f"worst tenth {worst:.3f}", transform=axes.get_xaxis_transform(), fontsize=8, color=INK, bbox=box
        )
        axes.set_xlim(0, 100)
        entitle(axes, f"{len(part)} {_label(kind)}", "sites, worst to best (%)", score if axes is first else "")
    figure.suptitle(_ranking_title(ranked), x=0.02, ha="left", fontsize=11, fontweight="bold", color=INK)
    handles = [Line2D([], [], color=COLOURS[kind], linewidth=2.2, label="personalized") for kind, _ in groups[:1]]
    handles.append(Line2D([], [], color=FAINT, marker="o", markersize=3, linewidth=0, label="global, same site"))
    handles.append(Line2D([], [], color=LOSS, label="made worse"))
    return finish(figure, first, handles)


def _judged(sites: pd.DataFrame) -> pd.DataFrame:
    """Returns the sites that have both scores, the worst first."""
    score = score_of(sites).name
    return worst_first(sites.dropna(subset=[f"global_{score}", f"personalized_{score}"]))


def _label(kind: str) -> str:
    return f"{kind} sites"


def _groups(sites: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    return ((kind, part) for kind in COLOURS if len(part := sites[sites["kind"] == kind]))


def _by_step(steps: pd.Series) -> NDArray[np.float64]:
    """Returns scores [sites, steps + 1]; a site that took fewer steps keeps its last score."""
    longest = max(len(scores) for scores in steps)
    return np.array([[*scores, *[scores[-1]] * (longest - len(scores))] for scores in steps], dtype=np.float64)


def _numbers(values: list[float | None]) -> NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in values])


def _ranking_title(ranked: pd.DataFrame) -> str:
    losing = int((ranked["gain"] < 0).sum())
    return f"{len(ranked)} sites before and after adapting; {losing or 'none'} made worse"


def _gain_label(sites: pd.DataFrame) -> str:
    return gain_label(score_of(sites))


def _short(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def figure_of(width: float, height: float, columns: int = 1) -> tuple[Figure, Axes]:
    """Returns an empty figure of the common look (inches), and its first axes."""
    figure = Figure(
        figsize=(width, height),
        dpi=DOTS_PER_INCH,
        facecolor=GROUND,
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12),
    )
    every = figure.subplots(1, columns, squeeze=False, sharey=True)
    for axes in every.flat:
        axes.set_facecolor(GROUND)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        axes.tick_params(colors=INK, labelsize=8)
        axes.grid(color="#E2E2E0", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, every[0, 0]


def entitle(axes: Axes, title: str, x: str, y: str) -> None:
    """Sets the title and the names of both axes."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)


def finish(figure: Figure, axes: Axes, handles: list[Line2D] | None = None) -> Figure:
    """Puts the legend below, where it hides no data."""
    entries = axes.get_legend_handles_labels()[0] if handles is None else handles
    if entries:
        figure.legend(handles=entries, loc="outside lower left", ncols=5, fontsize=8, frameon=False, labelcolor=INK)
    else:
        axes.text(0.5, 0.5, "no site has test rows", transform=axes.transAxes, ha="center", color=INK)
    return figure
