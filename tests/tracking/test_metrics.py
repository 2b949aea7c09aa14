"""Names of metrics: valid for MLflow and unique, whatever sites are called."""

import posixpath
import re

from hypothesis import example, given
from hypothesis import strategies as st

from fedmeta.tracking import metrics
from tests.tracking.made_up_run import RMSE, evaluation


def test_new_sites_get_their_curves_first():
    sites = evaluation(2, 4).sort_values("site", ascending=False)
    assert list(metrics.curves(sites, 3)) == ["new-001", "new-000", "site-003"]


@given(st.lists(st.text(min_size=1), unique=True))
@example(["a/b", "a_b", "A_b", ".", "..", " ", "x" * 300, "x" * 299 + "y"])
def test_any_name_becomes_a_unique_valid_one(names):
    suffixes = metrics.metric_suffixes(names)
    assert list(suffixes) == names
    assert len({suffix.casefold() for suffix in suffixes.values()}) == len(names)
    for suffix in suffixes.values():
        key = f"personalized_accuracy/{suffix}"
        assert re.fullmatch(r"[\w.\- :]+", suffix)
        assert posixpath.normpath(key) == key
        assert len(key) <= 250


def test_the_worst_site_comes_first_and_sites_without_a_score_last():
    sites = evaluation(2, 4, score=RMSE)
    sites.loc[3, "personalized_rmse"] = float("nan")
    ordered = metrics.worst_first(sites)["personalized_rmse"]
    assert ordered.iloc[:-1].is_monotonic_decreasing
    assert ordered.isna().tolist() == [False] * 5 + [True]


def test_sites_that_lose_or_diverge_are_left_behind():
    sites = evaluation(2, 4)
    sites["gain"] = [0.1, -0.1, -0.2, 0.0, 0.1, 0.1]
    sites.loc[0, "personalized_loss"] = float("inf")
    sites.loc[4, ["personalized_loss", "test_rows"]] = [float("nan"), 0]
    assert list(metrics.left_behind(sites)["site"]) == ["site-000", "new-001", "new-000"]
