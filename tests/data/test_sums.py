from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedmeta.data import ArrayPopulation, FeatureSums, feature_sums, split, standardisation, sums, train_sums
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Data
from tests.data.made import population


def of_rows(x: Any, **changes: Any) -> ArrayPopulation:
    """One site with these features."""
    return replace(population([len(x)]), x=x, y=np.zeros(len(x), dtype=np.int64), **changes)


def of(x: Any, standardise: str = "auto", **changes: Any) -> FeatureSums:
    return feature_sums(of_rows(x, **changes), np.arange(len(x)), standardise)


VALUES = st.floats(-1000, 1000, width=32) | st.just(np.nan)


@given(
    x=arrays.arrays(np.float32, st.tuples(st.integers(1, 9), st.integers(1, 4)), elements=VALUES),
    chunk=st.integers(1, 9),
)
def test_features_by_numpy(x: Any, chunk: int) -> None:
    whole = sums._CHUNK
    try:
        sums._CHUNK = chunk
        found = of(x, missing=True)
    finally:
        sums._CHUNK = whole
    wide = x.astype(np.float64)
    np.testing.assert_array_equal(found.count, (~np.isnan(x)).sum(0))
    np.testing.assert_allclose(found.total, np.nansum(wide, 0), atol=1e-9)
    np.testing.assert_allclose(found.square, np.nansum(wide**2, 0), atol=1e-9)
    scaling = standardisation(found)
    for column, (mean, scale) in enumerate(zip(scaling.mean, scaling.scale, strict=True)):
        own = wide[~np.isnan(wide[:, column]), column]
        assert mean == pytest.approx(own.mean() if len(own) else 0, abs=1e-4)
        deviation = own.std() if len(own) else 0
        assert scale == pytest.approx(deviation, rel=1e-3, abs=1e-3) or (deviation < 2e-3 and scale == 1)


@given(cut=st.integers(0, 8))
def test_sums_of_sites_add(cut: int) -> None:
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float16)
    whole, parts = of(x), feature_sums(of_rows(x), np.arange(cut), "auto")
    parts = parts + feature_sums(of_rows(x), np.arange(cut, 8), "auto")
    for name in ("count", "total", "square"):
        assert getattr(whole, name).dtype == np.float64
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-14)


def test_sums_of_different_features_do_not_add() -> None:
    with pytest.raises(FedmetaError, match=r"different shapes: \(2,\) and \(3,\)"):
        of(np.zeros((4, 2))) + of(np.zeros((4, 3)))


@pytest.mark.parametrize(
    ("shape", "standardise", "expected"),
    [
        ((5,), "auto", (5,)),
        ((5,), "image", (1,)),
        ((5,), "none", (1,)),
        ((5, 6), "auto", (1, 1)),
        ((5, 6), "features", (5, 6)),
        ((3, 5, 6), "auto", (3, 1, 1)),
        ((5, 6, 3), "auto", (1, 1, 3)),
        ((1, 5, 6), "auto", (1, 1, 1)),
        ((4, 5, 3), "auto", (4, 1, 1)),
        ((7, 5, 6), "auto", (1, 1, 1)),
        ((3, 5, 6), "none", (1, 1, 1)),
    ],
)
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_what_is_summed(shape: tuple[int, ...], standardise: str, expected: tuple[int, ...], dtype: str) -> None:
    x = np.random.default_rng(0).integers(0, 255, (6, *shape)).astype(dtype)
    found = of(x, standardise)
    assert found.count.shape == found.total.shape == found.square.shape == expected
    scale = standardisation(found)
    if standardise == "none":
        assert not found.count.any()
        assert scale.identity
        return
    axes = (0, *(axis + 1 for axis, size in enumerate(expected) if size == 1))
    mean = x.mean(axes, keepdims=True, dtype=np.float64)[0]
    deviation = x.std(axes, keepdims=True, dtype=np.float64)[0]
    np.testing.assert_allclose(scale.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(scale.scale, deviation, rtol=1e-6)
    assert not scale.identity


def test_tokens_are_never_standardised() -> None:
    codes = np.zeros((4, 5), dtype=np.uint8)
    assert standardisation(of(codes, tokens=True)).identity
    with pytest.raises(FedmetaError, match='set it to "none"'):
        of(codes, "features", tokens=True)


@pytest.mark.parametrize(
    ("column", "mean", "scale"),
    [
        ([3, 3, 3], 3, 1),
        ([0.1] * 3000, 0.1, 1),
        ([np.nan, np.nan], 0, 1),
        ([np.nan, 4], 4, 1),
        ([1e-30, 3e-30], 2e-30, 1e-30),
        ([1e-60, 3e-60], 0, 1),
        ([1e30, 3e30], 2e30, 1e30),
        ([1e6 - 3, 1e6 + 3], 1e6, 3),
        ([1e9 - 1, 1e9 + 1], 1e9, 1e3),
        ([1.7e9, 1.7e9 + 2e6], 1.7e9 + 1e6, 1e6),
    ],
)
def test_scales_of_odd_columns(column: list[float], mean: float, scale: float) -> None:
    found = standardisation(of(np.array(column)[:, None], missing=True))
    assert found.mean[0] == pytest.approx(mean, rel=1e-6, abs=1e-40)
    assert found.scale[0] == pytest.approx(scale, rel=1e-3)
    assert (found.mean.dtype, found.scale.dtype) == (np.float32, np.float32)


@pytest.mark.slow
@given(offset=st.floats(-1e9, 1e9), spread=st.floats(1e-9, 1e6), sites=st.integers(1, 20))
def test_standardised_values_are_of_the_size_of_one(offset: float, spread: float, sites: int) -> None:
    x = (offset + spread * np.random.default_rng(0).uniform(-1, 1, (sites, 50, 1))).astype(np.float64)
    total = of(x[0])
    for own in x[1:]:
        total = total + of(own)
    found = standardisation(total)
    assert np.isfinite(found.scale).all()
    assert abs((x - found.mean) / found.scale).max() < 4


def test_train_sums_are_those_of_all_train_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    there = population([5, 1, 30, 2])
    rows = split(there, Data(), 0)
    sites = np.array([0, 2, 3])
    expected = feature_sums(there, rows.train_rows(sites).rows, "auto")
    for at_once in (1, 4, 1000):
        monkeypatch.setattr(sums, "_SITE_ROWS", at_once)
        found = train_sums(rows, sites, "auto")
        for name in ("count", "total", "square"):
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name))
    assert not train_sums(rows, np.zeros(0, dtype=np.int64), "auto").count.any()
