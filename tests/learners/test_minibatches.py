"""Local epochs over mini-batches: every row once an epoch, the same steps by hand, by loop, vmap and low-rank form."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmeta import meta_gradients
from fedmeta.engines import loop, lowrank, vmap
from fedmeta.engines.personal_state import train_personal
from fedmeta.errors import FedmetaError
from fedmeta.learners import LEARNERS, Learner, build
from fedmeta.learners.local_steps import with_order
from fedmeta.minibatches import Minibatches, draw_order
from fedmeta.models import build as build_model
from fedmeta.task import Batch, OrderedTask, Task, stack

from .reference import loss, make_state, make_task, relative_error, theta_of

DESCENDING = (
    *("fedavg", "fedavg-ft", "fedprox", "reptile"),
    *("ditto", "fedrep", "fedper", "fedbabu", "scaffold", "apfl"),
)
BATCHED = (*DESCENDING, "pfedme", "per-fedavg")
SIZES = [(4, 7), (2, 3), (5, 11), (1, 1)]


def make(name: str, hidden: tuple[int, ...] = (5,), features: int = 4, **settings: object) -> Learner:
    module = build_model("mlp", (features,), 3, hidden=hidden, activation="tanh")
    return build(name, module, **{"inner_lr": 0.2, "batch_size": 3, **settings})


def tasks(features: int = 4) -> list[Task]:
    each = [make_task(seed, (features,), 3, support=a, query=b) for seed, (a, b) in enumerate(SIZES)]
    return [Task(*(tuple(t.double() if t.is_floating_point() else t for t in rows) for rows in task)) for task in each]


@given(
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    size=st.integers(0, 5),
    epochs=st.integers(1, 3),
    gap=st.integers(0, 2),
)
def test_every_epoch_has_every_row_once_and_ends_in_a_short_batch(
    counts: list[int], size: int, epochs: int, gap: int
) -> None:
    width = max(counts) + gap
    mask = np.zeros((len(counts), width), dtype=np.bool_)
    for site, count in enumerate(counts):
        mask[site, gap : gap + count] = True
    order = draw_order(Minibatches(size, epochs), mask)
    for site, count in enumerate(counts):
        for epoch in order[site]:
            taken = epoch[epoch >= 0]
            assert sorted(taken.tolist()) == list(range(gap, gap + count))
            lengths = [int((batch >= 0).sum()) for batch in epoch]
            full, short = divmod(count, size or max(1, count))
            assert [n for n in lengths if n] == [size or count] * full + [short] * (short > 0)


@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=4), size=st.integers(1, 4), steps=st.integers(1, 7))
def test_steps_are_counted_over_as_many_epochs_as_they_take(counts: list[int], size: int, steps: int) -> None:
    mask = np.arange(max(counts)) < np.array(counts)[:, None]
    order = draw_order(Minibatches(size, steps=steps), mask)
    assert ((order >= 0).any(3).sum((1, 2)) == steps).all()


def test_orders_are_drawn_by_the_number_of_rows_alone_where_nothing_else_is_known() -> None:
    one = draw_order(Minibatches(3, 2), np.ones((1, 8), dtype=np.bool_))
    other = draw_order(Minibatches(3, 2), np.arange(10) < np.array([[5], [8], [10]]))
    assert (other[1, :, :3] == one[0]).all()
    assert (one[0, 0] != one[0, 1]).any(), "another order in each epoch"


def by_hand(learner: Learner, task: OrderedTask, start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns what plain SGD over the mini-batches of a task makes of a start."""
    x, y = (torch.cat([task.support[k], task.query[k]]) for k in (0, 1))
    own = dict(start)
    for batch in task.order.flatten(0, 1):
        rows = batch[batch >= 0]
        leaves = {name: value.clone().requires_grad_() for name, value in own.items()}
        found = torch.autograd.grad(loss(learner.network.module, leaves, (x[rows], y[rows])), list(leaves.values()))
        own = {name: value - learner.inner_lr * g for (name, value), g in zip(own.items(), found, strict=True)}
    return own


@pytest.mark.parametrize("name", ["fedavg", "fedavg-ft", "reptile"])
def test_fedavg_is_sgd_over_the_rows(name: str) -> None:
    learner = make(name, local_epochs=3)
    state, task = make_state(learner), with_order(learner, stack(tasks())).task(2)
    assert isinstance(task, OrderedTask)
    assert task.order.shape == (3, 6, 3)
    theta = theta_of(state)
    expected = by_hand(learner, task, theta)
    sent, _ = learner.meta_gradient(state, task)
    moved = {f"theta.{key}": theta[key] - value for key, value in expected.items()}
    assert relative_error(sent, moved) < 1e-12
    assert relative_error(learner.meta_gradient(state, tasks()[2])[0], sent) == 0, "a task without an order has its own"


def weighted(learner: Learner, state: Mapping[str, Tensor], each: list[Task], weights: Tensor) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    for task, weight in zip(each, weights, strict=True):
        for key, value in learner.meta_gradient(state, task)[0].items():
            sums[key] = sums.get(key, 0) + weight * value
    return sums


@pytest.mark.quick("3-fedavg", "3-reptile")
@pytest.mark.parametrize("name", BATCHED)
@pytest.mark.parametrize("size", [0, 2, 3, 100])
def test_all_engines_take_the_same_steps(name: str, size: int) -> None:
    learner = make(name, batch_size=size)
    state, each = make_state(learner), tasks()
    weights = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    expected = weighted(learner, state, each, weights)
    batch = stack(each)
    assert relative_error(loop.meta_gradients(learner, state, batch, weights).total, expected) < 1e-12
    assert relative_error(vmap.meta_gradients(learner, state, batch, weights).total, expected) < 1e-10
    if learner.estimator == "delta":
        assert lowrank.fits(learner, batch, state) is None
        assert relative_error(lowrank.meta_gradients(learner, state, batch, weights).total, expected) < 1e-10
    start = learner.personal(state)
    if start:
        stacked = {key: value.expand(len(each), *value.shape) for key, value in start.items()}
        assert relative_error(train_personal(learner, state, batch, weights, stacked)[0], expected) < 1e-10


@pytest.mark.quick("2-hidden4-20-*", "0-*-fedavg", "5-hidden1-30-fedprox")
@pytest.mark.parametrize(("name", "own"), [("fedavg", {}), ("fedprox", {"mu": 2.0})], ids=["fedavg", "fedprox"])
@pytest.mark.parametrize(("hidden", "features"), [((), 30), ((40,), 30), ((40,), 3), ((6, 40), 30), ((200, 300), 20)])
@pytest.mark.parametrize("size", [0, 2, 5])
def test_the_low_rank_form_by_any_plan(
    name: str, own: dict[str, float], hidden: tuple[int, ...], features: int, size: int
) -> None:
    """Layers in low-rank form and layers with one weight per site, whichever its rule takes."""
    learner = make(name, hidden, features, batch_size=size, local_epochs=2, **own)
    state, batch = make_state(learner), stack(tasks(features))
    weights = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    expected = loop.meta_gradients(learner, state, batch, weights)
    found = lowrank.meta_gradients(learner, state, batch, weights)
    assert relative_error(found.total, expected.total) < 1e-10
    assert torch.allclose(found.metrics["query_loss"][0], torch.cat(expected.metrics["query_loss"]), rtol=1e-10)


@pytest.mark.slow
def test_the_plan_weighs_all_rows_against_the_layer() -> None:
    forms = {}
    for features, rows_there in ((2, 300), (700, 20)):
        learner = make("fedavg", (64,), features)
        rows = stack([make_task(0, (features,), 3, support=4, query=rows_there)])
        forms[features] = lowrank.plan_of(learner, with_order(learner, rows), make_state(learner))
    assert "1.weight" in forms[2].dense
    assert "1.weight" in forms[700].lowrank


@pytest.mark.quick("fedavg", "fedrep")
@pytest.mark.parametrize("name", BATCHED)
def test_chunks_cuts_and_unknown_labels_keep_the_order(name: str) -> None:
    """Rows with mask 0 anywhere are no rows; a site's steps do not hang on whom it is computed with."""
    learner = make(name, local_epochs=2) if name in DESCENDING else make(name, local_steps=4)
    state, each = make_state(learner), tasks()
    whole = stack(each)
    masks = [rows[2].clone() for rows in whole]
    masks[1][2, [0, 4, 5, 9]] = 0
    masks[0][0, 1] = 0
    batch = Batch((*whole.support[:2], masks[0]), (*whole.query[:2], masks[1]))
    minibatches = learner.minibatches
    assert minibatches is not None
    present = torch.cat([whole.support[2], whole.query[2]], 1) > 0
    order = draw_order(minibatches, present.numpy())
    batch = Batch(batch.support, batch.query, None, torch.from_numpy(order))
    weights = torch.ones(4, dtype=torch.float64)
    expected, _, _ = meta_gradients(learner, state, batch, "loop")
    for engine, chunk in (("loop", 2), ("vmap", 1), ("auto", 3), ("lowrank", 2)):
        found, _, _ = meta_gradients(learner, state, batch, engine, chunk=chunk)
        assert relative_error(found, expected) < 1e-10
    for sites in ([0], [3, 1]):
        part = batch.take(torch.tensor(sites)).cut()
        alone = loop.meta_gradients(learner, state, part, weights[: len(sites)]).total
        there = loop.meta_gradients(learner, state, batch.take(torch.tensor(sites)), weights[: len(sites)]).total
        assert relative_error(alone, there) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("clip", [1e-3, 0.5])
def test_clipped_sums_and_single_gradients(clip: float) -> None:
    learner = make("fedavg", (40,), 30)
    state, batch = make_state(learner), stack(tasks(30))
    expected, weight, _ = meta_gradients(learner, state, batch, "loop", clip_norm=clip)
    for engine in ("vmap", "lowrank"):
        found, own, _ = meta_gradients(learner, state, batch, engine, clip_norm=clip)
        assert own == weight
        assert relative_error(found, expected) < 1e-10
    each, _, _ = meta_gradients(learner, state, batch, "auto", per_site=True)
    for site, task in enumerate(tasks(30)):
        assert relative_error({k: v[site] for k, v in each.items()}, learner.meta_gradient(state, task)[0]) < 1e-10


def test_per_fedavg_adapts_on_one_batch_and_is_judged_by_another() -> None:
    learner = make("per-fedavg", batch_size=2, local_steps=1, local_lr=0.3)
    state, task = make_state(learner), tasks()[2]
    x, y = (torch.cat([task.support[k], task.query[k]]) for k in (0, 1))
    order = torch.tensor([[[9, 0, 4, 7]]])
    sent, figures = learner.meta_gradient(state, OrderedTask(*task, order))
    plain, expected = learner.meta_gradient(state, Task((x[[9, 0]], y[[9, 0]]), (x[[4, 7]], y[[4, 7]])))
    assert relative_error(sent, plain) < 1e-12
    assert float(figures["query_loss"]) == pytest.approx(float(expected["query_loss"]))


def test_what_has_no_rows_or_a_memory_takes_full_steps() -> None:
    from fedmeta.problems import Supervised
    from fedmeta.problems.solvers import Momentum

    class WithMomentum(Supervised):
        solver = Momentum()

    for name in LEARNERS:
        expected = name in BATCHED
        assert (build(name, nn.Linear(4, 3)).minibatches is not None) == expected
        if name in DESCENDING[:4]:
            learner = build(name, WithMomentum(build_model("logistic", (4,), 3)), inner_steps=2)
            assert learner.minibatches is None
            one, _ = learner.meta_gradient(make_state(learner), tasks()[0])
            more = build(name, learner.problem, inner_steps=3).meta_gradient(make_state(learner), tasks()[0])[0]
            assert relative_error(one, more) > 1e-3


@pytest.mark.parametrize("name", BATCHED)
def test_settings_that_cannot_be(name: str) -> None:
    with pytest.raises(FedmetaError, match=r"learner\.batch_size = -1: it must be at least 0"):
        make(name, batch_size=-1)
    if name in DESCENDING:
        with pytest.raises(FedmetaError, match=r"learner\.local_epochs = 0: it must be at least 1"):
            make(name, local_epochs=0)
