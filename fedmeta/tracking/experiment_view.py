"""How an experiment opens in the MLflow UI: saved views of its charts, kept in the experiment's tags.

One view shows all runs, and one for each data set those on it. Trials of a search are left out of both, for their
scores are of validation sites; clearing the search box shows them. (MLflow drops pinned runs from shared views.)

MLflow draws a chart for every metric it finds, in sections by prefix. The view orders the sections, puts the bars that
compare runs on top, folds away what is rarely asked, and leaves the params out of the picture's card. Metrics that it
does not name get their charts all the same. An MLflow that does not know the tag shows its usual page.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from fedmeta.problems.metric import Metric

KIND = {"mlflow.experimentKind": "custom_model_development"}
VIEW = "fedmeta"
"""The key of the view of all runs."""
VIEWS = "mlflow.sharedViewState."
VIEW_TAG = f"{VIEWS}{VIEW}"
DATA_TAG, KIND_TAG, TRIAL = "fedmeta.data", "fedmeta.kind", "trial"
PRIMARY_METRIC = "final/new_sites_personalized"
PICTURES = "0_summary"
"""The section of pictures; MLflow sorts it to the top."""
SITES_PICTURE = f"{PICTURES}/sites"
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
    """Returns the tags of an experiment whose runs have this score: its main metric, and the view of all runs."""
    search = f"tags.`{KIND_TAG}` != '{TRIAL}'"
    return {"mlflow.experiment.primaryMetric.name": PRIMARY_METRIC, VIEW_TAG: _view(VIEW, _state(score, search))}


def view_of(data: str) -> str:
    """Returns the key of a data set's view."""
    return f"{VIEW}-{re.sub(r'[^A-Za-z0-9_.-]', '_', data)[:100]}"


def data_tags(score: Metric, data: str) -> dict[str, str]:
    """Returns the tag of an experiment that is a data set's view.

    Args:
        score: What runs on these data are scored by.
        data: The data set, as runs name it in their tag `DATA_TAG`.
    """
    quote = '"' if "'" in data else "'"
    search = f"tags.`{DATA_TAG}` = {quote}{data}{quote} AND tags.`{KIND_TAG}` != '{TRIAL}'"
    return {f"{VIEWS}{view_of(data)}": _view(data, _state(score, search))}


def _view(name: str, state: dict[str, Any]) -> str:
    return json.dumps({"name": name, "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)})


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


def _state(score: Metric, search: str) -> dict[str, Any]:
    columns = [
        *(f"metrics.`{name}`" for name in BARS),
        "params.`learner.name`",
        "params.`runtime.seed`",
        f"tags.`{DATA_TAG}`",
    ]
    picture = {**_card("IMAGE", SITES_PICTURE), "imageKeys": [SITES_PICTURE], "step": 0}
    return {
        "searchFilter": search,
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
