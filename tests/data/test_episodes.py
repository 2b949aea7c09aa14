from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmeta.data import (
    ArrayPopulation,
    Episodes,
    Padded,
    draw_new_sites,
    evaluation_episodes,
    group_by_size,
    load,
    split,
    training_episodes,
)
from fedmeta.experiment import Data
from tests.data.made import population

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def lists(padded: Padded) -> list[list[int]]:
    return [rows[mask].tolist() for rows, mask in zip(padded.rows, padded.mask, strict=True)]


def places(of: ArrayPopulation, padded: Padded) -> list[list[float]]:
    return [of.x[rows, 0].tolist() for rows in lists(padded)]


@given(sizes=SIZES, support=st.integers(1, 25), query=st.integers(1, 25), classes=st.integers(1, 5))
def test_support_and_query_are_distinct_train_rows(sizes: list[int], support: int, query: int, classes: int) -> None:
    there = population(sizes, classes=classes)
    rows = split(there, Data(), 0)
    episodes = training_episodes(rows, there.all_sites, 3, support, query)
    train = rows.train_rows(there.all_sites)
    assert not episodes.scored
    for site, (adapts, scored) in enumerate(zip(lists(episodes.support), lists(episodes.query), strict=True)):
        own, size = train.of(site), len(train.of(site))
        assert len(adapts) == min(support, size - 1)
        assert len(scored) == min(query, size - len(adapts))
        assert len({*adapts, *scored}) == len(adapts) + len(scored)
        assert {*adapts, *scored} <= set(own.tolist())


@given(sizes=SIZES, support=st.integers(1, 25))
def test_evaluation_adapts_on_train_rows_and_scores_all_test_rows(sizes: list[int], support: int) -> None:
    there = population(sizes)
    rows = split(there, Data(), 0)
    episodes = evaluation_episodes(rows, there.all_sites, support)
    assert episodes.scored
    train, test = rows.train_rows(there.all_sites), rows.test_rows(there.all_sites)
    for site, (adapts, scored) in enumerate(zip(lists(episodes.support), lists(episodes.query), strict=True)):
        assert len(set(adapts)) == len(adapts) == min(support, len(train.of(site)))
        assert set(adapts) <= set(train.of(site).tolist())
        assert scored == test.of(site).tolist()


@given(
    counts=st.lists(st.integers(0, 30), min_size=2, max_size=5).filter(lambda counts: sum(counts) >= 2),
    round_number=st.integers(0, 50),
)
def test_any_stretch_has_classes_in_proportion(counts: list[int], round_number: int) -> None:
    there = population([sum(counts)], labels=list(np.repeat(np.arange(len(counts)), counts)), classes=len(counts))
    rows = split(there, Data(test=0.01), 0)
    size = int(rows.train_sizes(there.all_sites)[0])
    own = np.bincount(there.y[rows.train_rows(there.all_sites).rows], minlength=len(counts))
    for support in (size // 3, size // 2):
        episodes = training_episodes(rows, there.all_sites, round_number, max(1, support), size)
        for part in lists(episodes.support) + lists(episodes.query):
            drawn = np.bincount(there.y[part], minlength=len(counts))
            # Systematic sampling: each class is off by less than one row per end of the stretch, and a stretch is cut
            # where the classes together have had their share, which moves it by as much again.
            assert (abs(drawn - own * len(part) / size) <= len(counts)).all()


def test_stratified_support_has_every_common_class() -> None:
    there = population([60] * 30, classes=3)
    rows = split(there, Data(), 0)
    for round_number in range(5):
        episodes = training_episodes(rows, there.all_sites, round_number, 9, 9)
        for part in lists(episodes.support) + lists(episodes.query):
            assert np.bincount(there.y[part], minlength=3).min() >= 1


@given(sizes=SIZES, data=st.data(), round_number=st.integers(0, 3))
def test_a_sites_rows_do_not_depend_on_the_cohort(sizes: list[int], data: Any, round_number: int) -> None:
    there = population(sizes)
    rows = split(there, Data(), 1)
    cohort = np.array(data.draw(st.lists(st.integers(0, len(sizes) - 1), min_size=1, max_size=6)), dtype=np.int64)

    def drawn(sites: Any) -> list[Episodes]:
        return [training_episodes(rows, sites, round_number, 5, 4), evaluation_episodes(rows, sites, 5)]

    for whole, part in zip(drawn(there.all_sites), drawn(cohort), strict=True):
        for everyone, some in ((whole.support, part.support), (whole.query, part.query)):
            assert [lists(everyone)[site] for site in cohort] == lists(some)


@given(classes=st.integers(0, 4), extra=st.lists(st.integers(1, 30), max_size=4))
def test_a_sites_rows_do_not_depend_on_where_it_is_hosted(classes: int, extra: list[int]) -> None:
    """The same site alone on a node, whose list of classes is shorter and numbered otherwise, draws the same rows."""
    labels = (np.arange(25) % 4 + classes).tolist()
    alone = population([25], labels=labels, names=["m"], classes=9)
    others = labels + [0] * sum(extra)
    among = population([25, *extra], labels=others, names=["m", *(f"a{n}" for n in range(len(extra)))], classes=9)
    shifted = population([25], labels=[8 - label for label in labels], names=["m"], classes=9)
    for episodes in (
        lambda of: training_episodes(split(of, Data(), 5), of.find(["m"]), 7, 6, 5),
        lambda of: evaluation_episodes(split(of, Data(), 5), of.find(["m"]), 6),
    ):
        expected = episodes(alone)
        for there in (among, shifted):
            found = episodes(there)
            assert places(there, found.support) == places(alone, expected.support)
            assert places(there, found.query) == places(alone, expected.query)


def test_rounds_and_seeds_draw_anew_and_evaluation_does_not() -> None:
    there = population([30, 30])
    drawn = {
        str(lists(training_episodes(split(there, Data(), seed), there.all_sites, round_number, 5, 5).support))
        for seed in range(2)
        for round_number in range(4)
    }
    assert len(drawn) == 8
    first, again = (evaluation_episodes(split(there, Data(), 0), there.all_sites, 5) for _ in range(2))
    assert lists(first.support) == lists(again.support)


def test_every_row_is_as_likely_to_be_drawn() -> None:
    there = population([20] * 300, classes=2)
    rows = split(there, Data(split="blocks"), 0)
    episodes = training_episodes(rows, there.all_sites, 0, 4, 2)
    for padded, count in ((episodes.support, 4), (episodes.query, 2)):
        drawn = np.bincount(np.concatenate(places(there, padded)).astype(int), minlength=10)[:10]
        assert drawn.sum() == 300 * count
        assert (abs(drawn - 30 * count) < 4 * np.sqrt(30 * count)).all()


def test_sites_with_one_row() -> None:
    there = population([1, 1])
    rows = split(there, Data(), 0)
    training = training_episodes(rows, there.all_sites, 0, 5, 5)
    assert (training.support.mask.sum(), training.query.mask.tolist()) == (0, [[True], [True]])
    evaluation = evaluation_episodes(rows, there.all_sites, 5)
    assert (evaluation.support.mask.tolist(), evaluation.query.mask.sum()) == ([[True], [True]], 0)
    assert evaluation.query.rows.shape == (2, 1)


def test_no_sites() -> None:
    there = population([3])
    for episodes in (
        training_episodes(split(there, Data(), 0), np.zeros(0, dtype=np.int64), 0, 5, 5),
        evaluation_episodes(split(there, Data(), 0), np.zeros(0, dtype=np.int64), 5),
    ):
        assert episodes.support.rows.shape == episodes.query.mask.shape == (0, 1)


@given(sizes=st.lists(st.integers(0, 5000), max_size=60), rows=st.integers(1, 20_000))
def test_groups_bound_padding(sizes: list[int], rows: int) -> None:
    groups = group_by_size(np.array(sizes, dtype=np.int64), rows)
    assert sorted(np.concatenate(groups or [np.zeros(0)]).tolist()) == list(range(len(sizes)))
    for group in groups:
        own = [sizes[place] for place in group]
        assert own[0] == max(own)
        assert min(own) >= min(0.75 * own[0], own[0] - 2)
        assert len(own) == 1 or len(own) * own[0] <= rows


@pytest.mark.parametrize("count", [10**3, 10**6])
def test_a_round_of_a_million_sites_touches_the_cohort_alone(count: int) -> None:
    """The same sites, wherever the population ends, give the same rows (their names differ, so their draws do)."""
    data = Data(source="synthetic", sites=count, rows=12)
    there = load(data)
    rows = split(there, data, 0)
    cohort = np.array([count - 1, 7, 500])
    episodes = training_episodes(rows, cohort, 1, 4, 2)
    assert [{row // 12 for row in own} for own in lists(episodes.support)] == [{count - 1}, {7}, {500}]
    assert len(draw_new_sites(there.names[:50], 0.2, 0)) == 10
