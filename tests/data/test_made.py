"""The populations that need no file: synthetic and digits."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmeta import experiment
from fedmeta.data import SOURCES, ArrayPopulation, SyntheticPopulation, feature_sums, load, split
from fedmeta.data.synthetic import NumberedNames, normals
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Data


def synthetic(**keys: Any) -> SyntheticPopulation:
    there = load(Data(source="synthetic", **keys))
    assert isinstance(there, SyntheticPopulation)
    return there


@pytest.mark.slow
@given(count=st.integers(1, 10**7), data=st.data())
def test_names_are_numbers_and_sorted(count: int, data: Any) -> None:
    names = NumberedNames(count)
    some = sorted(data.draw(st.lists(st.integers(0, count - 1), max_size=5)))
    assert names.numbers([names[number] for number in some]) == some
    assert [names[number] for number in some] == sorted(names[number] for number in some)
    assert names[-1] == names[count - 1]
    assert names[:3] == [names[number] for number in range(min(3, count))]
    assert len(names) == count
    assert list(itertools.islice(names, 3)) == names[:3]
    for foreign in ("site-", "site-x", "", "ward-1", f"site-{count}", f"site-0{count - 1}", "site--1", "site- 1"):
        assert foreign not in names
        with pytest.raises(KeyError):
            names.numbers([*(names[number] for number in some), foreign])
    assert 7 not in names


def test_a_site_is_made_from_its_number() -> None:
    small, large = synthetic(sites=1000), synthetic(sites=1_000_000)
    assert (len(small), small.shape, small.class_names) == (1000, (20,), ("0", "1", "2", "3", "4"))
    sites = np.array([999, 3])
    rows = small.rows(sites)
    assert rows.sizes.tolist() == [40, 40]
    np.testing.assert_array_equal(large.rows(sites).rows, rows.rows)
    np.testing.assert_array_equal(large.labels(rows.rows), small.labels(rows.rows))
    assert large.features(rows.rows).equal(small.features(rows.rows))
    backwards = np.ascontiguousarray(rows.rows[::-1])
    assert small.features(backwards).flip(0).equal(small.features(rows.rows))
    assert small.find(["site-003", "site-999"]).tolist() == [3, 999]
    with pytest.raises(FedmetaError, match='no site "site-1000" among 1000 sites'):
        small.find(["site-003", "site-1000"])


def test_synthetic_rows_lie_about_their_centres() -> None:
    there = synthetic(sites=400, rows=50, features=8, classes=3, heterogeneity=1.0)
    rows = there.rows(there.all_sites)
    x, y = there.features(rows.rows).numpy(), there.labels(rows.rows)
    assert x.dtype == np.float32
    assert np.bincount(y) == pytest.approx([len(y) / 3] * 3, rel=0.05)
    centres = np.array([[x[(y == label) & (rows.owners == site)].mean(0) for label in range(3)] for site in range(400)])
    within = x - centres[rows.owners, y]
    assert within.std() == pytest.approx(1, abs=0.04)
    assert (centres - centres.mean(0)).std() == pytest.approx(np.sqrt(0.25 + 3 / 50), rel=0.05)


def test_heterogeneity_0_means_that_all_sites_are_alike() -> None:
    there = synthetic(sites=2, rows=4000, features=2, classes=2, heterogeneity=0.0)
    x, y = (part(there.rows(there.all_sites).rows) for part in (there.features, there.labels))
    first, second = (np.arange(8000) // 4000 == site for site in (0, 1))
    for label in (0, 1):
        gap = x[first & (y == label)].mean(0) - x[second & (y == label)].mean(0)
        assert abs(gap).max() < 0.1


def test_normals_are_normal_and_their_own() -> None:
    drawn = normals("test", np.arange(20_000, dtype=np.uint64), 5)
    assert drawn.shape == (20_000, 5)
    assert np.isfinite(drawn).all()
    assert drawn.mean() == pytest.approx(0, abs=0.02)
    assert drawn.std() == pytest.approx(1, abs=0.01)
    assert (drawn**4).mean() == pytest.approx(3, abs=0.15)
    assert abs(np.corrcoef(drawn.T) - np.eye(5)).max() < 0.03
    assert abs(np.corrcoef(drawn[1:, 0], drawn[:-1, 0])[0, 1]) < 0.03


def test_synthetic_digest_and_min_rows() -> None:
    assert len({synthetic(**keys).digest for keys in [{}, {"sites": 5}, {"heterogeneity": 2.0}, {}]}) == 3
    with pytest.raises(FedmetaError, match="min_rows = 41 leaves no site: synthetic sites have 40 rows"):
        synthetic(min_rows=41)


def test_digits() -> None:
    there, again = load(Data()), load(Data())
    assert isinstance(there, ArrayPopulation)
    assert there.digest == again.digest
    assert (there.x.shape, there.x.dtype) == ((1797, 8, 8), np.float32)
    assert there.names == tuple(f"site-{site:02d}" for site in range(40))
    assert there.class_names == tuple("0123456789")
    assert there.sites.sizes.sum() == 1797
    assert there.sites.sizes.min() >= 30
    assert sorted(there.sites.rows.tolist()) == list(range(1797))
    assert np.bincount(there.y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert 0 <= there.x.min() <= there.x.max() <= 16


def test_digits_differ_from_site_to_site() -> None:
    there = load(Data())
    commonest = [np.bincount(there.labels(there.rows(np.array([site])).rows)).max() for site in range(40)]
    assert np.mean(commonest) / 45 > 0.25
    ones = [there.rows(np.array([site])).rows for site in range(40)]
    images = [
        there.features(rows[there.labels(rows) == 1]).numpy().mean(0)
        for rows in ones
        if (there.labels(rows) == 1).sum() > 2
    ]
    spread = [np.linalg.norm(one - other) for one in images for other in images if one is not other]
    assert np.mean(spread) > 10


@pytest.mark.parametrize("source", ["digits", "synthetic"])
def test_made_populations_train(source: Any) -> None:
    data = Data(source=source, sites=50)
    there = load(data)
    rows = split(there, data, 0)
    sums = feature_sums(there, rows.train_rows(there.all_sites).rows, "auto")
    assert (sums.count > 0).all()


def test_every_source_of_the_schema_is_there() -> None:
    assert set(SOURCES) == set(experiment.SOURCES)
