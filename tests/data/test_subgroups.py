"""Subgroups of rows: names of bands and categories, what a site shows of them, what is refused."""

import numpy as np
import pytest

from fedmeta.data.arrays import build_population
from fedmeta.data.columns import encoded
from fedmeta.data.labels import encode_labels
from fedmeta.data.subgroups import HIDDEN, Subgrouping, all_levels, check, codes_of, parse, shown
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment

CATEGORIES = (("sex", ("F", "M")),)


def test_bands_and_categories_have_names() -> None:
    groupings = parse(["sex", "age: 40, 65", "blood: type"])
    assert groupings == (Subgrouping("sex"), Subgrouping("age", (40.0, 65.0)), Subgrouping("blood: type"))
    assert all_levels(groupings[:2], CATEGORIES) == (
        "sex=F", "sex=M", "sex=other", "age<40", "40<=age<65", "age>=65",
    )  # fmt: skip


@pytest.mark.parametrize("texts", [["age: 65, 40"], ["age: 40,"], [""], ["sex", "sex"], ["age: 4, 4"]])
def test_what_is_no_grouping_is_refused(texts: list[str]) -> None:
    with pytest.raises(FedmetaError, match=r"\[evaluation\] subgroups"):
        parse(texts)


@pytest.mark.parametrize(
    ("text", "message"), [("sexe", "no feature of the run; did you mean"), ("age", "give bands"), ("sex: 1", "alone")]
)
def test_columns_are_held_against_the_run(text: str, message: str) -> None:
    experiment = Experiment().with_overrides([f'evaluation.subgroups=["{text}"]'])
    with pytest.raises(FedmetaError, match=message):
        check(experiment, ("age", "sex"), CATEGORIES)
    with pytest.raises(FedmetaError, match="sums over sites alone"):
        check(experiment.with_overrides(["privacy.secure_aggregation=true"]), ("age", "sex"), CATEGORIES)


def test_small_subgroups_stay_and_are_no_difference_of_the_others() -> None:
    assert shown(np.array([50, 12, 0]), 10).tolist() == [True, True, False]
    assert shown(np.array([50, 12, 4]), 10).tolist() == [True, False, False], "4 would be the difference"
    assert shown(np.array([50, 7, 4]), 10).tolist() == [True, False, False]
    assert shown(np.array([3, 0]), 10).tolist() == [False, False]


def test_rows_get_the_code_of_their_own_cell() -> None:
    """Of raw values: a band begins at its edge, a name that the run does not know is other, a missing one in none."""
    x = np.array([[39.9, 0], [40, 1], [64, 2], [65, np.nan], [np.nan, 0]])
    labels = encode_labels(np.array([0, 1, 0, 1, 0]), lambda row: "", "classification", None)
    sites = np.zeros(5, dtype=int)
    raw = build_population("x", x, labels, sites, ["a"], lambda row, column: "", feature_names=("age", "sex"))
    from dataclasses import replace

    population = encoded(replace(raw, categories=(("sex", ("F", "M", "X")),)), CATEGORIES)
    rows = raw.rows(raw.all_sites).rows
    order = np.argsort(rows)
    age, sex = (codes_of(population, rows, each, CATEGORIES)[order].tolist() for each in parse(["age: 40, 65", "sex"]))
    assert age == [0, 1, 1, 2, HIDDEN]
    assert sex == [0, 1, 2, HIDDEN, 0]
