from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedmeta.data import (
    ArrayPopulation,
    Episodes,
    Padded,
    Standardisation,
    batches,
    class_codes,
    evaluation_episodes,
    gather,
    gather_rows,
    order_classes,
    split,
    standardised,
    training_episodes,
)
from fedmeta.engines.lowrank.flat_batch import adjacent
from fedmeta.experiment import Data
from tests.data.made import population

AS_IS = Standardisation(np.zeros(1, np.float32), np.ones(1, np.float32))
THREE = np.arange(3)


def of_rows(x: Any, y: Any = None, **changes: Any) -> ArrayPopulation:
    """One site with these features."""
    base = population([len(x)], classes=3)
    return replace(base, x=x, y=np.zeros(len(x), dtype=np.int64) if y is None else y, **changes)


def table(*rows: list[int]) -> Padded:
    """Lists of rows as a padded table whose padding points at row 0."""
    longest = max(1, *(len(own) for own in rows))
    mask = np.array([[place < len(own) for place in range(longest)] for own in rows])
    return Padded(np.array([own + [0] * (longest - len(own)) for own in rows], dtype=np.int64), mask)


def episodes_of(there: ArrayPopulation, scored: bool) -> Episodes:
    """All sites' episodes, of an evaluation or of a round."""
    rows = split(there, Data(), 0)
    return (
        evaluation_episodes(rows, there.all_sites, 4) if scored else training_episodes(rows, there.all_sites, 0, 4, 3)
    )


@pytest.mark.slow
@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=6), scored=st.booleans())
def test_batches_hold_the_rows_of_the_episodes(sizes: list[int], scored: bool) -> None:
    there = population(sizes)
    episodes = episodes_of(there, scored)
    batch = gather(there, episodes, AS_IS, THREE)
    for padded, (x, y, mask) in ((episodes.support, batch.support), (episodes.query, batch.query)):
        assert mask.bool().numpy().tolist() == padded.mask.tolist()
        assert x.shape == (*padded.rows.shape, 2)
        assert x[mask.bool()].tolist() == there.x[padded.rows[padded.mask]].tolist()
        assert y[mask.bool()].tolist() == there.y[padded.rows[padded.mask]].tolist()
        assert not x[~mask.bool()].any()
        assert not y[~mask.bool()].any()
        assert (x.dtype, y.dtype, mask.dtype) == (torch.float32, torch.int64, torch.float32)
    for site in range(batch.sites):
        assert len(batch.task(site).query[0]) == episodes.query.mask[site].sum()


@pytest.mark.slow
@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=6), scored=st.booleans())
def test_batches_of_a_round_lie_in_one_array(sizes: list[int], scored: bool) -> None:
    there = population(sizes)
    episodes = episodes_of(there, scored)
    batch = gather(there, episodes, AS_IS, THREE)
    for own, rows in zip(batch, episodes[:2], strict=True):
        expected = gather_rows(there, rows, AS_IS, THREE)
        assert all(torch.equal(one, other) for one, other in zip(own, expected, strict=True))
    assert adjacent(*batch) != scored


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stored", ["uint8", "uint16", "int32", "uint64", "int64", "float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 2, 3)])
def test_features_are_standardised(stored: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).integers(0, 100, (6, *shape)).astype(stored)
    kept = x.copy()
    mean, scale = (np.random.default_rng(1).uniform(1, 5, (2, *shape))).astype(np.float32)
    found = gather_rows(of_rows(x), table([5, 1], [2]), Standardisation(mean, scale), THREE, dtype)[0]
    expected = (x[[5, 1]].astype(np.float64) - mean) / scale
    assert found.dtype == dtype
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(x, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stored", ["uint8", "int64", "float16", "float32", "float64"])
def test_standardised_once_is_standardised_each_time(stored: str, dtype: torch.dtype) -> None:
    x = np.random.default_rng(0).integers(0, 100, (6, 3)).astype(stored)
    missing = stored.startswith("float")
    if missing:
        x[5, 1] = np.nan
    kept, there = x.copy(), of_rows(x, missing=missing)
    scale = Standardisation(*np.random.default_rng(1).uniform(1, 5, (2, 3)).astype(np.float32))
    ready, no_scale = standardised(there, scale, dtype)
    assert no_scale.identity
    rows = table([5, 1], [2])
    for found, expected in zip(
        gather_rows(ready, rows, no_scale, THREE, dtype), gather_rows(there, rows, scale, THREE, dtype), strict=True
    ):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    np.testing.assert_array_equal(x, kept)
    assert standardised(there, scale, dtype)[0] is ready


def test_what_is_large_or_mapped_or_has_no_scale_is_not_standardised_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scale = Standardisation(np.array([1, 5], np.float32), np.array([2, 4], np.float32))
    there, tokens = of_rows(np.zeros((3, 2), np.float32)), of_rows(np.zeros((3, 2), np.uint8), tokens=True)
    assert standardised(there, AS_IS, torch.float32) == (there, AS_IS)
    assert standardised(tokens, scale, torch.float32) == (tokens, scale)
    there.x.tofile(tmp_path / "x")
    mapped = of_rows(np.memmap(tmp_path / "x", np.float32, "c", shape=(3, 2)))
    assert standardised(mapped, scale, torch.float32) == (mapped, scale)
    assert standardised(there, scale, torch.float32) != (there, scale)
    monkeypatch.setattr(batches, "AT_ONCE", 3 * 2 * 4 - 1)
    large = of_rows(np.zeros((3, 2), np.float32))
    assert standardised(large, scale, torch.float32) == (large, scale)


def test_large_numbers_keep_their_differences() -> None:
    x = np.array([[1_700_000_000], [1_700_000_001], [1_700_000_003]])
    scale = Standardisation(np.full(1, 1.7e9, np.float32), np.full(1, 2, np.float32))
    for stored in ("int64", "float64", "uint32"):
        found = gather_rows(of_rows(x.astype(stored)), table([0, 1, 2]), scale, THREE)[0].flatten()
        assert (found - found[0]).tolist() == [0, 0.5, 1.5]


def test_missing_features_become_the_mean() -> None:
    x = np.array([[np.nan, 1], [3, np.nan]], dtype=np.float32)
    scale = Standardisation(np.array([1, 5], np.float32), np.array([2, 4], np.float32))
    assert gather_rows(of_rows(x, missing=True), table([0, 1]), scale, THREE)[0].tolist() == [[[0, -1], [1, 0]]]


def test_tokens_stay_codes() -> None:
    x = np.array([[7, 300], [0, 2]], dtype=np.uint16)
    found = gather_rows(of_rows(x, tokens=True), table([0], [1, 0]), AS_IS, THREE)
    assert found[0].tolist() == [[[7, 300], [0, 0]], [[0, 2], [7, 300]]]
    assert (found[0].dtype, found[2].dtype) == (torch.int64, torch.float32)


def test_labels_become_codes_of_the_run() -> None:
    there = of_rows(np.zeros((3, 1), np.float32), np.array([0, 1, 2]), class_names=("a", "c", "d"))
    codes = class_codes(there.class_names, ("a", "b", "d"))
    assert codes.tolist() == [0, -1, 2]
    lists = table([0, 1, 2], [2])
    _, y, mask = gather_rows(there, lists, AS_IS, codes)
    assert (y.tolist(), mask.tolist()) == ([[0, 0, 2], [2, 0, 0]], [[1, 0, 1], [1, 0, 0]])
    _, y, mask = gather_rows(there, lists, AS_IS, codes, scored=True)
    assert (y.tolist(), mask.tolist()) == ([[0, -1, 2], [2, 0, 0]], [[1, 1, 1], [1, 0, 0]])
    scored = gather(there, Episodes(lists, lists, scored=True), AS_IS, codes)
    assert (scored.support[1].min(), scored.query[1].min()) == (0, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_targets_of_regression(dtype: torch.dtype) -> None:
    there = of_rows(np.zeros((3, 1), np.float32), np.array([0.5, -1, 7]), class_names=())
    _, y, mask = gather_rows(there, table([2, 1], [0]), AS_IS, class_codes((), ()), dtype)
    assert (y.tolist(), mask.tolist(), y.dtype) == ([[7, -1], [0.5, 0]], [[1, 1], [1, 0]], dtype)


@given(x=arrays.arrays(np.float16, (5, 2), elements=st.floats(-100, 100, width=16) | st.just(np.nan)))
def test_batches_are_finite_whatever_is_missing(x: Any) -> None:
    scale = Standardisation(np.array([1, 5], np.float32), np.array([2, 4], np.float32))
    assert gather_rows(of_rows(x, missing=True), table([0, 1, 2], [3, 4]), scale, THREE)[0].isfinite().all()


@given(names=st.lists(st.integers(-(10**6), 10**6).map(str), max_size=20))
def test_classes_that_are_numbers_sort_as_numbers(names: list[str]) -> None:
    assert list(order_classes(names)) == [str(number) for number in sorted({int(name) for name in names})]


def test_other_classes_sort_as_text() -> None:
    assert order_classes(["10", "9", "x"]) == ("10", "9", "x")
    assert order_classes(["nan", "10", "9"]) == ("10", "9", "nan")
    assert order_classes(["1.0", "1", "0.5"]) == ("0.5", "1", "1.0")
    assert order_classes(name for name in ("b", "a", "b")) == ("a", "b")
