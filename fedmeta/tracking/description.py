"""What a run is called in MLflow, the tags that it is found by, and its description."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any
from zlib import crc32

import pandas as pd

from fedmeta import tables
from fedmeta.tables import number, percent
from fedmeta.tracking.experiment_view import DATA_TAG, KIND_TAG, TRIAL
from fedmeta.tracking.metrics import latest, left_behind, per_site

DESCRIPTION_LIMIT = 8000
NAMED_SITES = 12
SCORE_TAG, BETTER_TAG = "fedmeta.score", "fedmeta.better"
GAP = "\N{NO-BREAK SPACE}" * 3 + " "
"""MLflow leaves no space between a table's columns."""
# Of Okabe and Ito (2008), the others of Tol (2021): a learner looks alike in every chart and to every eye.
COLOURS = {
    "local": "#999999",
    "fedavg": "#56B4E9",
    "fedavg-ft": "#0072B2",
    "fomaml": "#E69F00",
    "maml": "#D55E00",
    "meta-sgd": "#009E73",
}
OTHER_COLOURS = ("#CC79A7", "#882255", "#44AA99", "#999933", "#332288", "#000000")


def data_name(params: Mapping[str, Any]) -> str:
    """Returns what to call a run's data: its own problem's name, the stem of its path, or its source."""
    problem = str(params.get("problem.name") or "supervised")
    if problem != "supervised":
        return problem.rpartition(":")[2]
    return PurePath(str(params.get("data.path") or "")).stem or str(params["data.source"])


def run_name(params: Mapping[str, Any]) -> str:
    """Returns a run's name, such as "maml · digits · seed 0"."""
    group = " · on validation sites" if params.get("evaluation.judge") == "validation_sites" else ""
    return f"{params['learner.name']} · {data_name(params)} · seed {params['runtime.seed']}{group}"


def tags(params: Mapping[str, Any]) -> dict[str, str]:
    """Returns the tags by which runs are found and grouped, and the color of their learner."""
    learner = str(params["learner.name"])
    parent = str(params.get("tracking.parent") or "")
    return {
        **({"mlflow.parentRunId": parent} if parent else {}),
        "fedmeta.learner": learner,
        DATA_TAG: data_name(params),
        KIND_TAG: TRIAL if params.get("evaluation.judge") == "validation_sites" and parent else "run",
        "fedmeta.seed": str(params["runtime.seed"]),
        "mlflow.runColor": COLOURS.get(learner) or OTHER_COLOURS[crc32(learner.encode()) % len(OTHER_COLOURS)],
    }


def score_tags(summary: Mapping[str, Any]) -> dict[str, str]:
    """Returns the tags of a finished run that name its score, and which way that is better."""
    score = summary["score"]
    return {SCORE_TAG: str(score["name"]), BETTER_TAG: "higher" if score["higher_is_better"] else "lower"}


def description(summary: Mapping[str, Any], sites: pd.DataFrame) -> str:
    """Returns the run's page in Markdown: the verdict in two lines, above MLflow's fold, then tables."""
    lines = [*verdict(summary, latest(sites)), "", *_table(*tables.results_table(summary))]
    lines += ["", f"Mean {tables.score_label(summary)}."]
    further = tables.metrics_table(summary)
    if further.rows:
        lines += ["", *_table(*further, left=2)]
    if in_time := tables.stream_lines(summary):
        lines += ["", *(f"- {tables.plain(line)}" for line in in_time)]
    if decided := tables.ledger_lines(summary):
        lines += ["", "Decisions:", "", *(f"- {tables.plain(line)}" for line in decided)]
    worst = per_site(sites).head(NAMED_SITES)
    if len(worst):
        rows = [tuple(row) for row in worst.itertuples(index=False)]
        lines += ["", "Worst first:", "", *_table(tuple(tables.heading(str(name)) for name in worst), rows, left=2)]
    return "\n".join([*lines, "", f"{summary['rounds']} rounds in {summary['wall_s']:.0f} s."])[:DESCRIPTION_LIMIT]


def verdict(summary: Mapping[str, Any], sites: pd.DataFrame) -> list[str]:
    """Returns two lines: how well new sites are served, and which sites are left behind."""
    found = tables.groups(summary)
    label, group = found[0] if found else ("sites", summary["new_sites"])
    note = " (no new site was seen)" if "judge" in summary else ""
    score, after = summary["score"], group["personalized"]
    unit = f" {score['unit']}" if score.get("unit") else ""
    first = (
        f"**{summary['learner']}: {score['name']} {number(after['mean'])}{unit} on {group['n']} {label}{note}**"
        f" ({number(group['global']['mean'])} before adapting; {percent(group['helped'])} helped,"
        f" {percent(group['harmed'])} harmed, worst 10 % {number(after['worst_decile'])})."
    )
    losing = [str(name) for name in left_behind(sites)["site"]]
    more = f" and {len(losing) - NAMED_SITES} more" if len(losing) > NAMED_SITES else ""
    names = ", ".join(tables.plain(name[:60]) for name in losing[:NAMED_SITES])
    second = f"Left behind, {len(losing)} of {len(sites)}: {names}{more}." if losing else "No site is left behind."
    nature = " Support and query are the same data by nature." if summary.get("held_out") is False else ""
    return [first, "", second + nature]


def _table(headings: tuple[str, ...], rows: list[tuple[tables.Cell, ...]], left: int = 1) -> list[str]:
    shortened = [tuple(cell[:80] if isinstance(cell, str) else cell for cell in row) for row in rows]
    return tables.markdown_table(headings, shortened, left, padding=GAP)
