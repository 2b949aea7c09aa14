"""Inner products of rows that are known before a round."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmeta.data import (
    ArrayPopulation,
    Standardisation,
    evaluation_episodes,
    gather,
    gram,
    gram_matrices,
    split,
    training_episodes,
)
from fedmeta.experiment import Data
from tests.data.made import population

AS_IS = Standardisation(np.zeros(1, np.float32), np.ones(1, np.float32))
THREE = np.arange(3)


def wide(sizes: list[int], **changes: Any) -> ArrayPopulation:
    """Sites of these sizes with as wide rows as are looked up."""
    there = population(sizes)
    x = np.random.default_rng(sum(sizes)).standard_normal((len(there.x), gram.WIDE), dtype=np.float32)
    return replace(there, x=x, **changes)


@given(sizes=st.lists(st.integers(1, 12), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_a_batch_knows_the_products_of_its_rows(sizes: list[int], seed: int) -> None:
    there = wide(sizes)
    found = gram_matrices(there, AS_IS, torch.float32)
    sites = np.random.default_rng(seed).permutation(len(sizes))[:3]
    episodes = training_episodes(split(there, Data(), seed), sites, 1, 4, 3)
    batch = gather(there, episodes, AS_IS, THREE, pairs=found)
    x = torch.cat([batch.support[0], batch.query[0]], 1)
    torch.testing.assert_close(batch.pairs, x @ x.transpose(1, 2), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(batch.chunk(0, 1).pairs, batch.pairs[:1])


def test_padding_has_none_though_other_rows_are_not_finite() -> None:
    there = wide([1, 9])
    there.x[there.sites.of(0)] = np.inf
    batch = gather(
        there,
        training_episodes(split(there, Data(), 0), np.array([1, 0]), 1, 4, 3),
        AS_IS,
        THREE,
        pairs=gram_matrices(there, AS_IS, torch.float32),
    )
    assert batch.pairs is not None
    assert batch.pairs[0].isfinite().all()
    mask = torch.cat([batch.support[2], batch.query[2]], 1)[1]
    assert mask.sum() == 1
    assert batch.pairs[1][mask == 0].eq(0).all()
    assert not batch.pairs[1][mask == 1][:, mask == 1].isfinite().any()


def test_an_evaluation_does_without() -> None:
    there = wide([6, 6])
    episodes = evaluation_episodes(split(there, Data(), 0), there.all_sites, 3)
    assert gather(there, episodes, AS_IS, THREE, pairs=gram_matrices(there, AS_IS, torch.float32)).pairs is None


def test_they_are_known_of_few_wide_rows_as_they_are_stored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there = wide([3, 2])
    assert gram_matrices(there, AS_IS, torch.float32) is not None
    assert gram_matrices(there, AS_IS, torch.float64) is None
    assert gram_matrices(there, Standardisation(np.ones(1, np.float32), np.ones(1, np.float32)), torch.float32) is None
    assert gram_matrices(replace(there, missing=True), AS_IS, torch.float32) is None
    assert gram_matrices(replace(there, x=there.x[:, 1:]), AS_IS, torch.float32) is None
    there.x.tofile(tmp_path / "x")
    mapped = replace(there, x=np.memmap(tmp_path / "x", np.float32, "c", shape=there.x.shape))
    assert gram_matrices(mapped, AS_IS, torch.float32) is None
    monkeypatch.setattr(gram, "AT_ONCE", 5 * 3 * 4 - 1)
    assert gram_matrices(wide([2, 3]), AS_IS, torch.float32) is None
