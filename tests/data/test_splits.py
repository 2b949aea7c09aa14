from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmeta.data import draw_new_sites, split
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Data
from tests.data.made import population

SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@given(sizes=SIZES, test=st.floats(0.01, 0.99), how=st.sampled_from(["random", "blocks"]), seed=st.integers(0, 3))
def test_every_row_is_on_one_side(sizes: list[int], test: float, how: Any, seed: int) -> None:
    there = population(sizes)
    rows = split(there, Data(test=test, split=how), seed)
    train, tested = rows.train_rows(there.all_sites), rows.test_rows(there.all_sites)
    assert train.sizes.tolist() == rows.train_sizes(there.all_sites).tolist()
    assert tested.sizes.tolist() == rows.test_sizes(there.all_sites).tolist()
    for site, size in enumerate(sizes):
        both = np.concatenate([train.of(site), tested.of(site)])
        assert sorted(both) == sorted(there.sites.of(site))
        assert len(train.of(site)) >= 1
        assert len(tested.of(site)) >= min(1, size - 1)
        assert abs(len(tested.of(site)) - test * size) <= 1
        if how == "blocks":
            assert both.tolist() == there.sites.of(site).tolist()


@given(sizes=SIZES, data=st.data())
def test_a_cohort_gets_its_own_rows(sizes: list[int], data: Any) -> None:
    there = population(sizes)
    rows = split(there, Data(), 0)
    cohort = np.array(data.draw(st.lists(st.integers(0, len(sizes) - 1), max_size=5)), dtype=np.int64)
    for side in (rows.train_rows, rows.test_rows):
        whole, part = side(there.all_sites), side(cohort)
        assert len(part) == len(cohort)
        for place, site in enumerate(cohort):
            assert part.of(place).tolist() == whole.of(site).tolist()


def test_a_random_split_depends_on_seed_and_name_alone() -> None:
    there, other = population([9, 30, 4]), population([30, 5], names=["site-001", "another"])

    def places(of: Any, name: str, seed: int) -> list[float]:
        sites = of.find([name])
        return of.x[split(of, Data(), seed).test_rows(sites).rows, 0].tolist()

    assert places(there, "site-001", 0) == places(other, "site-001", 0)
    assert places(there, "site-001", 0) != places(there, "site-001", 1)
    assert places(population([30, 30]), "site-000", 0) != places(population([30, 30]), "site-001", 0)
    assert places(there, "site-001", 0) != sorted(places(there, "site-001", 0))


def test_rows_are_as_likely_to_test_as_asked() -> None:
    there = population([10] * 400)
    tested = split(there, Data(test=0.3), 0).test_rows(there.all_sites)
    places = np.bincount(there.x[tested.rows, 0].astype(int), minlength=10)
    assert places.sum() == 1200
    assert (abs(places - 120) < 4 * np.sqrt(400 * 0.3 * 0.7)).all()


NAMES = st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=30, unique=True)


@given(names=NAMES, share=st.floats(0, 0.999), seed=st.integers(0, 3), data=st.data())
def test_new_sites_are_a_draw_over_names(names: list[str], share: float, seed: int, data: Any) -> None:
    new = draw_new_sites(names, share, seed)
    assert draw_new_sites(data.draw(st.permutations(names)), share, seed) == new
    assert list(new) == sorted(set(new))
    assert set(new) <= set(names)
    assert len(new) < len(names)
    if share > 0 and len(names) >= 2:
        assert len(new) == min(len(names) - 1, max(1, round(share * len(names))))


@given(count=st.integers(1, 40))
def test_new_sites_by_count(count: int) -> None:
    names = [f"n{number}" for number in range(20)]
    if count < 20:
        assert len(draw_new_sites(names, count, 0)) == count
    else:
        with pytest.raises(FedmetaError, match=rf"new_sites = {count} leaves no site.*20 sites, so at most 19"):
            draw_new_sites(names, count, 0)


def test_new_sites_follow_the_seed() -> None:
    names = [f"n{number}" for number in range(20)]
    assert len({draw_new_sites(names, 0.3, seed) for seed in range(8)}) > 5
    assert draw_new_sites(names, 0, 0) == ()
    assert draw_new_sites(["only"], 0.5, 0) == ()
    with pytest.raises(FedmetaError, match="whole number"):
        draw_new_sites(names, 1.5, 0)


def test_new_sites_by_name() -> None:
    names = [f"n{number}" for number in range(20)]
    assert draw_new_sites(names, ("n7", "n12", "n7"), 0) == ("n12", "n7")
    assert draw_new_sites(names, (), 0) == ()
    with pytest.raises(FedmetaError, match=r'data\.new_sites: no site "n71" among 20 sites; did you mean "n7"\?'):
        draw_new_sites(names, ("n1", "n71"), 0)
    with pytest.raises(FedmetaError, match="names every site"):
        draw_new_sites(names, names, 0)
