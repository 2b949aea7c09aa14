"""Whatever shows results takes results that are not finite, and groups that are empty: it shows, and never fails."""

import json
import math
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from rich.console import Console

from fedmeta import tables
from fedmeta.cli import adapt_output, live
from fedmeta.cli import tables as shown
from fedmeta.evaluation import bootstrap_interval, headline, left_behind, summarize_scores
from fedmeta.experiment import Experiment
from fedmeta.problems.metric import Metric
from fedmeta.progress import Progress
from fedmeta.report import parts
from fedmeta.search.comparison_report import spread
from fedmeta.tracking import comparison_plots, metrics, plots
from fedmeta.tracking.description import description
from tests.tracking.made_up_run import ACCURACY, RMSE, SNR, evaluation, summary

FEW = settings(max_examples=60, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
"""Without shrinking: an example is small anyway."""
ODD = st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-300, 1e300, -1e300, 1e6, 0.5, 0.25, -3.0])
SCORES = st.sampled_from([ACCURACY, RMSE, SNR])


@st.composite
def histories(draw: st.DrawFn) -> tuple[pd.DataFrame, Metric]:
    """Evaluations of a run whose every figure may be anything; either group of sites may be empty."""
    score = draw(SCORES)
    new, training = draw(st.sampled_from([(1, 0), (0, 2), (3, 0), (2, 3), (1, 1)]))
    rounds = []
    for round_number in range(draw(st.integers(1, 2))):
        frame = evaluation(new, training, round_number=round_number, score=score)
        for column in frame.select_dtypes("float"):
            if draw(st.booleans()):
                frame[column] = draw(st.lists(ODD, min_size=len(frame), max_size=len(frame)))
        frame["steps"] = [draw(st.lists(ODD, min_size=3, max_size=3)) for _ in range(len(frame))]
        rounds.append(frame)
    return pd.concat(rounds, ignore_index=True), score


@pytest.mark.slow
@given(histories())
@FEW
def test_tables_and_pages_take_any_figure(found: tuple[pd.DataFrame, Metric]) -> None:
    sites, score = found
    with np.errstate(all="ignore"):
        whole = summary(sites, 40, score=score)
        assert "NaN" not in json.dumps(whole)
        assert "Infinity" not in json.dumps(whole)
        with redirect_stderr(StringIO()):
            shown.results(whole, Experiment())
        for table in (tables.results_table(whole), tables.metrics_table(whole)):
            assert all(len(row) == len(table.headings) for row in table.rows)
            text = "\n".join(tables.markdown_table(*table))
            assert not {"nan", "inf", "None"} & set(text.replace("|", " ").split())
        assert "nan" not in description(whole, sites).split()
        parts.site_table("sites", metrics.latest(sites), score)
        logged = {
            **metrics.final_metrics(whole, sites),
            **metrics.evaluation_metrics(sites, whole, metrics.curves(sites, 9)),
        }
        assert all(math.isfinite(value) for value in logged.values())
        metrics.per_site(sites)
        left_behind(sites)
        headline(whole)
        assert all(
            "left out of the means" in line for key in tables.GROUPS for line in tables.with_diverged(whole[key])
        )


@pytest.mark.slow
@given(histories())
@settings(FEW, max_examples=10)
def test_pictures_take_any_figure(found: tuple[pd.DataFrame, Metric]) -> None:
    sites, score = found
    with np.errstate(all="ignore"):
        for name, draw in plots.PLOTS.items():
            assert draw(sites, score).axes, name
        learners = ["maml", "fedavg"]
        both = pd.concat([metrics.latest(sites).assign(learner=name) for name in learners], ignore_index=True)
        assert comparison_plots.every_site(both, learners, "new", score).axes
        assert comparison_plots.over_rounds({name: [sites] for name in learners}, "new", score).axes


@pytest.mark.slow
@given(st.lists(ODD, min_size=4, max_size=4), ODD, SCORES)
@settings(FEW, max_examples=15)
def test_pictures_of_comparisons_take_any_figure(values: list[float], traffic: float, score: Metric) -> None:
    row = dict(zip(("personalized", "difference", "low", "high"), values, strict=True))
    table = pd.DataFrame([{"learner": "maml", **row, "bytes_up": 1e6}, {"learner": "local", **row, "bytes_up": 0.0}])
    assert comparison_plots.differences(table, "local", score).axes
    assert comparison_plots.traffic(table, score).axes
    assert "nan" not in spread(values[0], values[1])


@pytest.mark.slow
@given(st.lists(ODD, max_size=40), st.lists(ODD | st.none(), min_size=1, max_size=6))
def test_the_live_view_takes_any_score(values: list[float], scores: list[float | None]) -> None:
    bars = live.sparkline(values)
    assert len(bars) == min(len(values), live.MOST_BARS)
    assert set(bars) <= {*live.BARS, live.NO_BAR}
    view, console = live.RunView("a run", 9), Console(file=StringIO(), width=120)
    for number, score in enumerate(scores):
        view.update(Progress(number, 9, score, score))
        console.print(view.group)


@given(st.lists(ODD, max_size=9), SCORES)
def test_means_and_intervals_take_any_figure(values: list[float], score: Metric) -> None:
    with np.errstate(all="ignore"):
        found: dict[str, Any] = summarize_scores(pd.Series(values, dtype=float), score)
        finite = [value for value in values if math.isfinite(value)]
        assert found["n"] == len(finite)
        assert (found["mean"] is None) == (not finite)
        bootstrap_interval(np.array(finite))
    for value in values:
        assert tables.number(value) not in ("nan", "inf", "-inf")
        assert tables.percent(value) not in ("nan%", "inf%", "-inf%")


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_an_estimate_that_is_not_finite_is_shown(value: float | None) -> None:
    from fedmeta.adapt.intervals import Estimate

    number = math.nan if value is None else value
    assert adapt_output._cells(Estimate("rmse", number, 0.0, number, 3), number, bold=True)[0] == "[bold]-[/]"
