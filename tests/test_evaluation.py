import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmeta import evaluation as evaluation_module
from fedmeta.checkpoint import Evaluation
from fedmeta.evaluation import headline, left_behind, sites_frame, summarize_scores
from fedmeta.problems import BUILT_IN, Metric
from fedmeta.tables import with_diverged


def frame_of(
    before: list[float],
    after: list[float],
    *,
    kinds: list[str] | None = None,
    test_rows: list[int] | None = None,
    chosen: list[int] | None = None,
    reference: list[float] | None = None,
    regression: bool = False,
) -> pd.DataFrame:
    """Returns the frame of sites with these scores before and after two inner steps; halfway after one."""
    first, last = np.array(before, dtype=float), np.array(after, dtype=float)
    scores = np.stack([first, (first + last) / 2, last], axis=1)
    sites = len(before)
    evaluation = Evaluation(
        round_number=4,
        sites=np.arange(sites),
        figures={metrics_of(regression)[0].name: scores, "loss": 10 * scores},
        chosen=np.array(chosen or [2] * sites, dtype=np.int64),
        local={metrics_of(regression)[0].name: np.array(reference or [math.nan] * sites)},
    )
    return sites_frame(
        [f"site-{site}" for site in range(sites)],
        kinds or ["new"] * sites,
        [7] * sites,
        test_rows or [5] * sites,
        evaluation,
        metrics_of(regression),
    )


def metrics_of(regression: bool) -> tuple[Metric, ...]:
    return (Metric("rmse", False),) if regression else (Metric("accuracy", True),)


def summarize(frame: pd.DataFrame) -> dict[str, Any]:
    return evaluation_module.summarize(frame, metrics_of("global_rmse" in frame))


# ---------------------------------------------------------------- one row per site


def test_a_row_shows_before_after_and_every_step() -> None:
    frame = frame_of([0.5, 0.8], [0.7, 0.4], kinds=["new", "training"])
    assert frame["site"].tolist() == ["site-0", "site-1"]
    assert frame["kind"].tolist() == ["new", "training"]
    assert frame["round"].tolist() == [4, 4]
    assert frame["global_accuracy"].tolist() == [0.5, 0.8]
    assert frame["personalized_accuracy"].tolist() == [0.7, 0.4]
    assert frame["gain"].tolist() == pytest.approx([0.2, -0.4])
    assert frame["global_loss"].tolist() == [5.0, 8.0]
    assert frame["personalized_loss"].tolist() == [7.0, 4.0]
    assert frame["steps"].tolist()[0] == pytest.approx([0.5, 0.6, 0.7])


def test_what_counts_is_the_score_after_the_steps_that_a_site_takes() -> None:
    frame = frame_of([0.5, 0.5, 0.5], [0.1, 0.1, 0.1], chosen=[0, 1, 2])
    assert frame["personalized_accuracy"].tolist() == pytest.approx([0.5, 0.3, 0.1])
    assert frame["personalized_loss"].tolist() == pytest.approx([5.0, 3.0, 1.0])
    assert frame["ungated_accuracy"].tolist() == pytest.approx([0.1, 0.1, 0.1])
    assert frame["gain"].tolist() == pytest.approx([0.0, -0.2, -0.4])
    assert frame["steps_taken"].tolist() == [0, 1, 2]
    assert left_behind(frame) == 2


def test_an_error_that_falls_is_a_gain() -> None:
    frame = frame_of([2.0, 1.0], [1.5, 1.25], regression=True)
    assert "global_accuracy" not in frame
    assert frame["global_rmse"].tolist() == [2.0, 1.0]
    assert frame["personalized_rmse"].tolist() == [1.5, 1.25]
    assert frame["gain"].tolist() == [0.5, -0.25]
    assert left_behind(frame) == 1


def test_a_site_without_test_rows_has_no_score() -> None:
    frame = frame_of([0.5, 0.0], [0.7, 0.0], test_rows=[5, 0])
    row = frame.iloc[1]
    unknown = ["global_accuracy", "personalized_accuracy", "gain", "global_loss", "personalized_loss"]
    assert row[unknown].isna().all()
    assert np.isnan(row["steps"]).all()
    assert row["rows"] == 7
    summary = summarize(frame)["new_sites"]
    assert summary["n"] == 1
    assert summary["global"]["mean"] == 0.5
    assert summary["helped"] == 1.0
    assert left_behind(frame) == 0


# ---------------------------------------------------------------- summaries by hand


def test_scores_are_summarised_as_by_hand() -> None:
    found = summarize_scores(pd.Series([0.2, 0.4, math.nan, 0.6, 0.8]), Metric("accuracy", True))
    assert 0.2 <= found.pop("low") < 0.5 < found.pop("high") <= 0.8
    assert found == pytest.approx({"mean": 0.5, "std": math.sqrt(0.05), "worst_decile": 0.2, "min": 0.2, "n": 4})


@pytest.mark.parametrize(
    ("sites", "worst"), [(1, [0]), (9, [0]), (10, [0]), (11, [0, 1]), (20, [0, 1]), (21, [0, 1, 2]), (100, range(10))]
)
def test_the_worst_decile_is_the_mean_of_the_worst_tenth_rounded_up(sites: int, worst: list[int]) -> None:
    values = np.random.default_rng(sites).permutation(sites)
    summary = summarize_scores(pd.Series(values / 100), Metric("accuracy", True))
    assert summary["worst_decile"] == pytest.approx(np.mean(list(worst)) / 100)
    highest = summarize_scores(pd.Series(values / 100), Metric("rmse", False))
    assert highest["worst_decile"] == pytest.approx((sites - 1 - np.mean(list(worst))) / 100)


def test_groups_are_summarised_apart() -> None:
    frame = frame_of(
        [0.5, 0.6, 0.7, 0.9],
        [0.7, 0.5, 0.7, 0.1],
        kinds=["new", "new", "training", "validation"],
        reference=[0.3, 0.5, math.nan, math.nan],
    )
    summary = summarize(frame)
    assert set(summary) == {"new_sites", "training_sites"}
    new, training = summary["new_sites"], summary["training_sites"]
    assert (new["n"], training["n"]) == (2, 1)
    assert new["global"]["mean"] == pytest.approx(0.55)
    assert new["personalized"]["mean"] == pytest.approx(0.6)
    assert new["personalized"]["worst_decile"] == new["personalized"]["min"] == 0.5
    assert new["personalized"]["loss"] == pytest.approx(6.0)
    assert new["helped"] == 0.5
    assert new["gain"] == pytest.approx(0.05)
    assert new["local_only"]["mean"] == pytest.approx(0.4)
    assert (new["harmed"], new["beats_local"]) == (0.5, 0.5)
    assert training["global"]["std"] == 0.0
    # As good as before is neither helped nor harmed.
    assert (training["helped"], training["harmed"]) == (0.0, 0.0)
    assert training["local_only"]["mean"] is None


def test_for_regression_the_worst_errors_are_the_highest() -> None:
    summary = summarize(frame_of([2.0, 1.0], [1.5, 1.25], regression=True))["new_sites"]
    assert summary["global"]["worst_decile"] == 2.0
    assert summary["personalized"]["worst_decile"] == 1.5
    assert summary["global"]["mean"] == 1.5
    assert summary["helped"] == 0.5


def test_a_group_without_sites_is_empty_and_no_error() -> None:
    summary = summarize(frame_of([0.5], [0.7]))["training_sites"]
    assert summary["n"] == 0
    assert summary["helped"] is None
    assert summary["global"]["mean"] is None
    assert summarize(frame_of([], []))["new_sites"]["personalized"]["mean"] is None


def test_a_site_whose_adaptation_ran_away_is_counted_and_not_helped() -> None:
    frame = frame_of([2.0, 2.0], [math.nan, 0.7], regression=True)
    summary = summarize(frame)["new_sites"]
    assert (summary["n"], summary["diverged"], summary["helped"]) == (1, 1, 0.5)
    assert summary["personalized"]["mean"] == 0.7
    assert left_behind(frame) == 1
    # An accuracy can be counted even of outputs that are no numbers; the loss gives them away.
    frame = frame_of([0.5, 0.5], [0.6, 0.7])
    frame.loc[0, "personalized_loss"] = math.nan
    summary = summarize(frame)["new_sites"]
    assert (summary["n"], summary["diverged"], summary["helped"]) == (1, 1, 0.5)
    assert left_behind(frame) == 1
    assert summarize(frame_of([0.5], [math.nan], test_rows=[0]))["new_sites"]["diverged"] == 0


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.sampled_from(["new", "training"])), min_size=1, max_size=30)
)
def test_summaries_keep_within_the_scores(rows: list[tuple[float, float, str]]) -> None:
    before, after, kinds = (list(column) for column in zip(*rows, strict=True))
    frame = frame_of(before, after, kinds=kinds)
    for group in summarize(frame).values():
        if not group["n"]:
            continue
        for state in ("global", "personalized"):
            figures: dict[str, Any] = group[state]
            assert figures["min"] <= figures["worst_decile"] + 1e-12 <= figures["mean"] + 2e-12
            assert 0 <= figures["std"] <= 0.5 + 1e-12
        assert 0 <= group["helped"] <= 1
    harmed = sum(group["harmed"] * group["n"] for group in summarize(frame).values() if group["n"])
    assert round(harmed) == left_behind(frame)


# ---------------------------------------------------------------- which figure comes first


def test_the_headline_is_of_new_sites_where_there_are_any() -> None:
    mixed = summarize(frame_of([0.5, 0.9], [0.7, 0.9], kinds=["new", "training"]))
    assert headline(mixed) == (0.5, 0.7)
    assert headline(summarize(frame_of([0.9], [0.8], kinds=["training"]))) == (0.9, 0.8)
    assert headline(summarize(frame_of([0.9], [0.8], kinds=["training"], test_rows=[0]))) == (None, None)


@pytest.mark.parametrize("loss", [np.nan, np.inf, 1e6])
def test_means_are_given_with_and_without_sites_whose_steps_blew_up(loss: float) -> None:
    """A finite loss of a hundred times the global one counts as diverged too."""
    score = 1000.0 if np.isfinite(loss) else np.nan
    figures = {
        "rmse": np.array([[2.0, 1.0], [2.0, score], [4.0, 3.0]]),
        "loss": np.array([[4.0, 1.0], [4.0, loss], [16.0, 9.0]]),
    }
    evaluation = Evaluation(3, np.arange(3), figures, np.ones(3, dtype=np.int64))
    metrics = [BUILT_IN["rmse"]]
    frame = sites_frame(["a", "b", "c"], ["new"] * 3, [9] * 3, [9] * 3, evaluation, metrics)
    summary = evaluation_module.summarize(frame, metrics)["new_sites"]
    assert (summary["n"], summary["diverged"], summary["harmed"]) == (2, 1, pytest.approx(1 / 3))
    assert summary["personalized"]["mean"] == 2.0
    assert summary["personalized_with_diverged"] == (pytest.approx(1004 / 3) if np.isfinite(loss) else None)
    shown = with_diverged(summary)[0]
    assert "1 diverged" in shown
    assert ("334.667" if np.isfinite(loss) else "not finite") in shown
    calm = evaluation_module.summarize(frame.assign(personalized_loss=1.0, personalized_rmse=1.0), metrics)["new_sites"]
    assert with_diverged(calm) == []
    assert calm["personalized_with_diverged"] == calm["personalized"]["mean"] == 1.0
