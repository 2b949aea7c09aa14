"""Cohorts whose rows' inner products are known beforehand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedmeta import engines, models
from fedmeta.engines.lowrank.capture import WARMUP_CALLS
from fedmeta.learners import Learner, build
from fedmeta.task import Batch
from tests.engines.cases import CLASSES, state, tasks

WIDTH = 60
RAGGED = [(4, 5), (1, 3), (6, 2), (5, 5)]
LEARNERS = ["maml", "fomaml", "anil", "maml++", "reptile", "fedavg", "per-fedavg", "local"]


def mlp() -> nn.Module:
    return models.build("mlp", (WIDTH,), CLASSES, hidden=(24,))


def with_pairs(batch: Batch) -> Batch:
    x = torch.cat([batch.support[0], batch.query[0]], 1).flatten(2)
    return replace(batch, pairs=x @ x.transpose(1, 2))


def assert_alike(learner: Learner, one: Batch, other: Batch, dtype: torch.dtype, **how: object) -> None:
    own = state(learner, dtype)
    for _ in range(WARMUP_CALLS + 1):
        found, expected = (engines.meta_gradients(learner, own, batch, "lowrank", **how) for batch in (one, other))
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for name, value in expected[0].items():
        torch.testing.assert_close(found[0][name], value, rtol=tolerance, atol=tolerance)
    losses = (figures["query_loss"] for _, _, figures in (found, expected))
    torch.testing.assert_close(*losses, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert torch.equal(found[2]["finite"], expected[2]["finite"])


@pytest.mark.quick("maml-*")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LEARNERS)
def test_known_products_change_nothing(name: str, dtype: torch.dtype) -> None:
    batch = tasks(RAGGED, (WIDTH,), dtype)
    assert_alike(build(name, mlp(), inner_steps=3), with_pairs(batch), batch, dtype)


@pytest.mark.quick("how1-maml", "how3-maml")
@pytest.mark.parametrize("name", ["maml", "fedavg"])
@pytest.mark.parametrize("how", [{"chunk": 1}, {"chunk": 3}, {"clip_norm": 0.1}, {"per_site": True}])
def test_nor_do_they_in_parts_or_site_by_site(name: str, how: dict[str, object]) -> None:
    batch = tasks(RAGGED, (WIDTH,))
    assert_alike(build(name, mlp(), inner_steps=2), with_pairs(batch), batch, torch.float64, **how)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["maml", "fedavg"])
def test_sites_of_unequal_size_and_sites_that_are_not_finite_keep_theirs(name: str) -> None:
    batch = tasks([(9, 9), (1, 1), (8, 9), (1, 2), (1, 1)], (WIDTH,))
    learner = build(name, mlp(), inner_steps=2)
    assert_alike(learner, with_pairs(batch), batch, torch.float64)
    batch.query[0][2, 0, 0] = torch.nan
    assert_alike(learner, with_pairs(batch), batch, torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["maml", "fedavg"])
def test_they_are_what_is_computed_with(name: str) -> None:
    batch = tasks(RAGGED, (WIDTH,))
    wrong = replace(batch, pairs=2 * with_pairs(batch).pairs)
    learner = build(name, mlp(), inner_steps=2)
    with pytest.raises(AssertionError):
        assert_alike(learner, wrong, batch, torch.float64)


@pytest.mark.quick("first0-maml", "first3-maml")
@pytest.mark.parametrize("name", ["maml", "fedavg"])
@pytest.mark.parametrize("first", [nn.LayerNorm(WIDTH), nn.Dropout(0.0), nn.Tanh(), nn.Linear(WIDTH, WIDTH)])
def test_they_are_of_the_rows_and_not_of_what_a_layer_makes_of_them(name: str, first: nn.Module) -> None:
    batch = tasks(RAGGED, (WIDTH,))
    learner = build(name, nn.Sequential(first, nn.Linear(WIDTH, 24), nn.ReLU(), nn.Linear(24, CLASSES)), inner_steps=2)
    assert_alike(learner, with_pairs(batch), batch, torch.float64)


def test_those_of_another_type_than_the_models_are_not_taken() -> None:
    batch = tasks(RAGGED, (WIDTH,), torch.float32)
    assert_alike(build("maml", mlp(), inner_steps=2), with_pairs(batch), batch, torch.float64)
