"""How an experiment opens in the MLflow UI: a saved view of its charts, kept in the experiment's tags.

MLflow draws a chart for every metric it finds, in sections by prefix. The view puts the sections in the order in which
one reads them, the bars that compare runs on top, folds away what is rarely asked, and leaves the params, all of them,
out of the picture's card. Metrics that it does not name get their charts all the same.
"""

import json
from typing import Any, NamedTuple

VIEW = "fedmeta"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
PRIMARY_METRIC = "final/new_sites_personalized"
PICTURE = "0_summary/sites"
COMPARISON = "comparison"
"""What the charts of a comparison's own run begin with."""
BARS = (
    PRIMARY_METRIC,
    "final/new_sites_global",
    "final/new_sites_worst_decile",
    "final/helped",
    "final/sites_left_behind",
    "final/training_sites_personalized",
)
COMPARED = (
    "new_sites_personalized",
    "new_sites_global",
    "new_sites_worst",
    "helped",
    "difference",
    "seconds",
    "bytes_up",
)
"""Sections of such a run's charts, a chart for each learner."""
COLUMN_WIDTH = 190


class Section(NamedTuple):
    """Charts of one prefix, `columns` beside each other and `height` pixels tall."""

    name: str
    columns: int = 3
    height: int = 360
    open: bool = True


SECTIONS = (
    Section("final"),
    Section("0_summary", columns=1, height=420),
    Section("new_sites", columns=2),
    Section("training_sites", columns=2),
    Section("personalized_accuracy"),
    Section("global_accuracy", open=False),
    Section("train"),
    Section("time", open=False),
    Section("traffic", open=False),
    Section("failures", open=False),
    Section(COMPARISON, columns=1, height=420),
    *(Section(f"{COMPARISON}/{name}", open=False) for name in COMPARED),
)


def experiment_tags() -> dict[str, str]:
    """Returns the tags of a new experiment: its kind, its main metric, and the view."""
    return {
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.experiment.primaryMetric.name": PRIMARY_METRIC,
        VIEW_TAG: view(),
    }


def view() -> str:
    """Returns the view in the form in which MLflow saves one."""
    return json.dumps({"name": VIEW, "createdAt": 0, "updatedAt": 0, "state": json.dumps(_state())})


def _state() -> dict[str, Any]:
    columns = [*(f"metrics.`{name}`" for name in BARS), "params.`learner.name`", "params.`runtime.seed`"]
    return {
        "orderByKey": f"metrics.`{PRIMARY_METRIC}`",
        "orderByAsc": False,
        "selectedColumns": columns,
        "columnOrder": columns,
        "columnWidths": dict.fromkeys(columns[: len(BARS)], COLUMN_WIDTH),
        "runsHiddenMode": "FIRST_20_RUNS",
        "hideEmptyCharts": True,
        "isAccordionReordered": True,
        "compareRunSections": [_section(section) for section in SECTIONS],
        "compareRunCharts": [*(_bar(name) for name in BARS), _picture()],
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


def _bar(name: str) -> dict[str, Any]:
    return {**_card("BAR", name), "metricKey": name}


def _picture() -> dict[str, Any]:
    return {**_card("IMAGE", PICTURE), "imageKeys": [PICTURE], "step": 0, "showRunParams": False}
