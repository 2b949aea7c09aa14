"""How an experiment opens in the MLflow UI: a saved view of its charts, kept in the experiment's tags.

MLflow draws a chart for every metric it finds, in sections by prefix. The view orders the sections, puts the bars that
compare runs on top, folds away what is rarely asked, and leaves the params out of the picture's card. Metrics that it
does not name get their charts all the same. An MLflow that does not know the tag shows its usual page.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from fedmeta.problems.metric import Metric

KIND = {"mlflow.experimentKind": "custom_model_development"}
VIEW = "fedmeta"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
PRIMARY_METRIC = "final/new_sites_personalized"
PICTURES = "0_summary"
"""The section of pictures; MLflow sorts it to the top."""
COMPARISON = "comparison"
"""What the charts of a comparison's run begin with."""
BARS = (
    PRIMARY_METRIC,
    "final/new_sites_global",
    "final/new_sites_local_only",
    "final/new_sites_worst_decile",
    "final/helped",
    "final/harmed",
    "final/sites_left_behind",
    "final/training_sites_personalized",
)
COMPARED = ("new_sites_personalized", "new_sites_global", "new_sites_worst", "new_sites_local_only", "helped",
            "harmed", "difference", "seconds", "bytes_up")  # fmt: skip
"""Sections of a comparison's charts, a chart for each learner."""
COLUMN_WIDTH = 190


class Section(NamedTuple):
    """Charts of one prefix, `columns` beside each other and `height` pixels tall."""

    name: str
    columns: int = 3
    height: int = 360
    open: bool = True


def tags(score: Metric) -> dict[str, str]:
    """Returns the tags of an experiment whose runs have this score: its main metric, and the view."""
    view = {"name": VIEW, "createdAt": 0, "updatedAt": 0, "state": json.dumps(_state(score))}
    return {"mlflow.experiment.primaryMetric.name": PRIMARY_METRIC, VIEW_TAG: json.dumps(view)}


def _sections(score: Metric) -> list[Section]:
    return [
        Section("final"),
        Section(PICTURES, columns=1, height=420),
        Section("new_sites", columns=2),
        Section("training_sites", columns=2),
        Section(f"personalized_{score.name}"),
        Section(f"global_{score.name}", open=False),
        Section("train"),
        *(Section(name, open=False) for name in ("time", "traffic", "failures")),
        Section(COMPARISON, columns=1, height=420),
        *(Section(f"{COMPARISON}/{name}", open=False) for name in COMPARED),
    ]


def _state(score: Metric) -> dict[str, Any]:
    columns = [*(f"metrics.`{name}`" for name in BARS), "params.`learner.name`", "params.`runtime.seed`"]
    picture = {**_card("IMAGE", f"{PICTURES}/sites"), "imageKeys": [f"{PICTURES}/sites"], "step": 0}
    return {
        "orderByKey": f"metrics.`{PRIMARY_METRIC}`",
        "orderByAsc": not score.higher_is_better,
        "selectedColumns": columns,
        "columnOrder": columns,
        "columnWidths": dict.fromkeys(columns[: len(BARS)], COLUMN_WIDTH),
        "runsHiddenMode": "FIRST_20_RUNS",
        "hideEmptyCharts": True,
        "isAccordionReordered": True,
        "compareRunSections": [_section(section) for section in _sections(score)],
        "compareRunCharts": [
            *({**_card("BAR", name), "metricKey": name} for name in BARS),
            {**picture, "showRunParams": False},
        ],
    }


def _section(section: Section) -> dict[str, Any]:
    return {
        "uuid": f"section-{section.name}",
        "name": section.name,
        "display": section.open,
        "columns": section.columns,
        "cardHeight": section.height,
        "isReordered": True,
        "deleted": False,
        "isGenerated": True,
    }


def _card(kind: str, name: str) -> dict[str, Any]:
    section, _, label = name.partition("/")
    return {
        "uuid": f"chart-{name}",
        "type": kind,
        "metricSectionId": f"section-{section}",
        "displayName": label,
        "runsCountToCompare": 20,
        "deleted": False,
        "isGenerated": True,
    }
