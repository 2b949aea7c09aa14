"""What every learner keeps to: its keys, types, masks, seeds, and sites with too few rows."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmeta import engines
from fedmeta.engines import ENGINES
from fedmeta.errors import FedmetaError
from fedmeta.learners import LEARNERS, Learner, build, learner_class, settings_of
from fedmeta.models import build as build_model
from fedmeta.problems import Supervised
from fedmeta.task import Rows, Task, rows_mask

from .reference import flat, make_regression, make_state, make_task, padded, relative_error

STANDARDISATION = {
    "standardisation.mean": torch.full((4,), 7.0, dtype=torch.float64),
    "standardisation.scale": torch.full((4,), 0.1, dtype=torch.float64),
}


def make(name: str, **keys: object) -> Learner:
    short = {"solve_steps": 3} if name == "average" else {}
    return build(
        name, build_model("mlp", (4,), 3, hidden=(5,), activation="tanh"), **{"inner_steps": 2, **short, **keys}
    )


@pytest.fixture(params=LEARNERS)
def learner(request: pytest.FixtureRequest) -> Learner:
    return make(request.param)


@pytest.mark.slow
def test_sends_the_meta_states_keys_and_shapes(learner: Learner) -> None:
    state = make_state(learner)
    gradient, metrics = learner.meta_gradient(state, make_task(0, (4,), 3))
    assert {name: value.shape for name, value in gradient.items()} == {n: v.shape for n, v in state.items()}
    assert all(value.dtype == torch.float64 and bool(value.isfinite().all()) for value in gradient.values())
    assert metrics["query_loss"].shape == ()
    assert learner.update in ("gradient", "delta", "nothing")
    assert (float(flat(gradient).abs().max()) == 0) == (learner.update == "nothing")


def test_reports_what_it_sends(learner: Learner) -> None:
    """The server's default optimizer and the engines rely on it."""
    gradients = {"maml": "exact", "anil": "exact", "meta-sgd": "exact", "maml++": "exact", "fomaml": "first-order"}
    plain = dict.fromkeys(("fedavg", "fedavg-ft", "fedprox", "reptile"), "delta") | gradients | {"local": "nothing"}
    name = next(name for name, kind in LEARNERS.items() if kind is type(learner))
    assert learner.estimator == plain.get(name, "custom")
    assert learner.adapts == (name != "fedavg")
    expected = (
        "gradient"
        if name in (*gradients, "imaml", "protonet", "fedmeta-per")
        else "nothing"
        if name == "local"
        else "delta"
    )
    assert learner.update == expected


@pytest.mark.quick("maml", "fedrep")
def test_passes_over_keys_that_are_not_its_own(learner: Learner) -> None:
    state, task = make_state(learner), make_task(0, (4,), 3)
    plain, _ = learner.meta_gradient(state, task)
    gradient, _ = learner.meta_gradient({**STANDARDISATION, **state}, task)
    assert all(float(gradient.pop(name).abs().max()) == 0 for name in STANDARDISATION)
    assert relative_error(gradient, plain) == 0 if learner.update != "nothing" else True
    assert relative_error(learner.adapt({**STANDARDISATION, **state}, task.support), learner.adapt(state, task[0])) == 0


@pytest.mark.quick("maml-*", "imaml-*")
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_agree_on_ragged_sites(learner: Learner, engine: str) -> None:
    tasks = [make_task(seed, (4,), 3, support=3 + seed, query=6 - seed) for seed in range(4)]
    state = make_state(learner)
    expected = [learner.meta_gradient(state, task)[0] for task in tasks]
    total, weight, metrics = engines.meta_gradients(learner, state, tasks, engine, weights=[1, 2, 3, 4], chunk=3)
    summed = {name: sum((k + 1) * own[name] for k, own in enumerate(expected)) for name in state}
    assert weight == 10
    assert metrics["query_loss"].shape == (4,)
    assert flat(total).sub(flat(summed)).norm() <= 1e-10 * flat(summed).norm()


@pytest.mark.slow
@given(support=st.integers(0, 3), query=st.integers(0, 3), seed=st.integers(0, 20))
@settings(max_examples=8, deadline=None)
@pytest.mark.parametrize("name", LEARNERS)
def test_a_masked_row_is_no_row(name: str, support: int, query: int, seed: int) -> None:
    learner, plain = make(name), make_task(seed, (4,), 3)
    state = make_state(learner)
    masked = Task(padded(plain.support, support), padded(plain.query, query))
    ours, theirs = (learner.meta_gradient(state, task)[0] for task in (masked, plain))
    assert float((flat(ours) - flat(theirs)).norm()) <= 1e-9 * float(flat(theirs).norm())
    assert relative_error(learner.adapt(state, masked.support), learner.adapt(state, plain.support)) < 1e-9


def nothing(rows: Rows, mask: bool) -> Rows:
    return (rows[0], rows[1], torch.zeros_like(rows_mask(rows))) if mask else (rows[0][:0], rows[1][:0])


@pytest.mark.parametrize("mask", [False, True])
def test_without_support_a_site_stays_at_theta(learner: Learner, mask: bool) -> None:
    state, task = make_state(learner), make_task(0, (4,), 3)
    own = learner.adapt(state, nothing(task.support, mask))
    assert relative_error(own, learner.theta(state)) == 0
    gradient, metrics = learner.meta_gradient(state, Task(nothing(task.support, mask), task.query))
    assert bool(flat(gradient).isfinite().all())
    assert bool(metrics["query_loss"].isfinite())


@pytest.mark.parametrize("mask", [False, True])
def test_without_any_row_a_site_sends_zeros(learner: Learner, mask: bool) -> None:
    state, task = make_state(learner), make_task(0, (4,), 3)
    gradient, metrics = learner.meta_gradient(state, Task(nothing(task.support, mask), nothing(task.query, mask)))
    assert float(flat(gradient).abs().max()) == 0
    assert float(metrics["query_loss"]) == 0


@pytest.mark.parametrize("mask", [False, True])
def test_without_query_rows_a_gradient_is_zero(learner: Learner, mask: bool) -> None:
    state, task = make_state(learner), make_task(0, (4,), 3)
    gradient, metrics = learner.meta_gradient(state, Task(task.support, nothing(task.query, mask)))
    assert bool(flat(gradient).isfinite().all())
    assert float(metrics["query_loss"]) == 0
    if learner.update == "gradient":
        assert float(flat(gradient).abs().max()) == 0


def test_rows_of_an_unseen_class_count_for_nothing_and_score_as_wrong(learner: Learner) -> None:
    state, task = make_state(learner), make_task(0, (4,), 3)
    x, y = task.query
    unseen = Task(task.support, (torch.cat([x, x[:2]]), torch.cat([y, torch.tensor([-1, -1])])))
    ours, theirs = (learner.meta_gradient(state, each)[0] for each in (unseen, task))
    assert flat(ours).sub(flat(theirs)).norm() <= 1e-12 * flat(theirs).norm()
    own = learner.adapt(state, task.support)
    accuracy = learner.evaluate(own, task.query)["accuracy"]
    with_unseen = learner.evaluate(own, unseen.query)["accuracy"]
    assert float(with_unseen) == pytest.approx(float(accuracy) * 5 / 7, rel=1e-6)


@pytest.mark.quick("maml-*", "fedrep-*")
@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.uint8])
def test_masks_and_classes_may_be_of_any_type(learner: Learner, kind: torch.dtype) -> None:
    state, plain = make_state(learner), Task(*(padded(rows, 3) for rows in make_task(0, (4,), 3)))
    other = Task(*((x, y.int(), mask.to(kind)) for x, y, mask in plain))
    ours, theirs = (learner.meta_gradient(state, task)[0] for task in (other, plain))
    assert float((flat(ours) - flat(theirs)).abs().max()) == 0
    theta = learner.theta(state)
    assert learner.evaluate(theta, other.query) == learner.evaluate(theta, plain.query)
    scores = [engines.evaluate(learner, state, [task, task]) for task in (other, plain)]
    assert all(torch.equal(scores[0][name], scores[1][name]) for name in scores[0])


@pytest.mark.slow
def test_a_regression_target_may_be_a_vector_or_a_column(learner: Learner) -> None:
    kind, task = type(learner), make_regression(1)
    if kind is LEARNERS["protonet"]:
        pytest.skip("of classes alone: tests/learners/test_protonet.py has the refusal")
    linear = kind(build_model("mlp", (3,), 1, hidden=(4,), activation="tanh"), inner_steps=2, inner_lr=0.05)
    state = make_state(linear)
    column = Task(*((x, y[:, None]) for x, y in task))
    ours, theirs = (linear.meta_gradient(state, each)[0] for each in (column, task))
    assert float((flat(ours) - flat(theirs)).abs().max()) == 0
    outputs = linear.predict(linear.theta(state), task.query[0])
    figures = linear.evaluate(linear.theta(state), task.query)
    score, mean = figures["rmse"], figures["loss"]
    assert float(mean) == pytest.approx(float((outputs[:, 0] - task.query[1]).square().mean()))
    assert float(score) == pytest.approx(float(mean) ** 0.5)


def test_both_precisions(learner: Learner) -> None:
    state, task = make_state(learner), make_task(0, (4,), 3)
    half = {name: value.float() for name, value in state.items()}
    single = Task(*((x.float(), y) for x, y in task))
    ours, theirs = learner.meta_gradient(half, single)[0], learner.meta_gradient(state, task)[0]
    assert all(value.dtype == torch.float32 for value in ours.values())
    assert flat(ours).double().sub(flat(theirs)).norm() <= 1e-2 * flat(theirs).norm()
    mixed = learner.meta_gradient(half, task)[0]
    assert all(value.dtype == torch.float32 for value in mixed.values())


class Bag(nn.Module):
    """The mean of embedded integer symbols, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        mean: Tensor = self.embedding(x).mean(-2)
        return self.head(mean)


@pytest.mark.quick("maml-*")
@pytest.mark.parametrize("engine", ENGINES)
def test_integer_rows_reach_an_embedding(learner: Learner, engine: str) -> None:
    embedded = dataclasses.replace(learner, problem=Supervised(Bag()))
    draw = torch.Generator().manual_seed(0)
    tasks = [
        Task(*((torch.randint(6, (n, 5), generator=draw), torch.randint(3, (n,), generator=draw)) for n in (4, size)))
        for size in (3, 2)
    ]
    state = make_state(embedded)
    total, _, _ = engines.meta_gradients(embedded, state, tasks, engine)
    summed = sum(flat(embedded.meta_gradient(state, task)[0]) for task in tasks)
    assert flat(total).sub(summed).norm() <= 1e-10 * summed.norm()


def test_init_depends_on_the_seed_alone(learner: Learner) -> None:
    torch.manual_seed(0)
    first = learner.init(3)
    drawn = torch.rand(2)
    torch.manual_seed(0)
    assert bool((torch.rand(2) == drawn).all()), "init must leave the global generator alone"
    again, other = learner.init(3), learner.init(4)
    assert all(bool((first[name] == again[name]).all()) for name in first)
    assert not bool((flat(first) == flat(other)).all())


def test_a_function_that_makes_the_model_keeps_its_own_initial_values() -> None:
    def zeros() -> nn.Module:
        module = nn.Linear(2, 2)
        nn.init.zeros_(module.weight)
        return module

    state = build("maml", zeros).init(0)
    assert float(state["theta.weight"].abs().max()) == 0
    assert float(state["theta.bias"].abs().max()) > 0


def test_names_and_keys() -> None:
    with pytest.raises(FedmetaError, match='no learner "mamal"; did you mean "maml"'):
        make("mamal")
    with pytest.raises(FedmetaError, match='"maml" has no key "iner_lr"; did you mean "inner_lr"'):
        make("maml", iner_lr=0.1)
    with pytest.raises(FedmetaError, match="cannot be imported"):
        make("no.such.module:Thing")
    with pytest.raises(FedmetaError, match="not a subclass"):
        make("fedmeta.learners:build")
    for name, steps in (("maml", -1), ("maml++", 0)):
        with pytest.raises(FedmetaError, match=rf"learner\.inner_steps = {steps}"):
            make(name, inner_steps=steps)
    assert learner_class("fedmeta.learners.maml:Maml") is LEARNERS["maml"]
    assert {"inner_steps", "inner_lr", "global_weight"} <= set(settings_of(LEARNERS["maml"]))


@pytest.mark.quick("maml-conv4-*")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model", ["conv4", "char_lstm"])
def test_deep_models_run_under_every_engine(learner: Learner, model: str, engine: str) -> None:
    shape = (16, 16) if model == "conv4" else (4,)
    deep = dataclasses.replace(learner, problem=Supervised(build_model(model, shape, 3, hidden=(3, 3), filters=2)))
    tasks = [make_task(seed, shape, 3, support=2 + seed, query=2) for seed in range(2)]
    if model == "char_lstm":
        tasks = [Task(*((x.abs().long().clamp(max=2), y) for x, y in task)) for task in tasks]
    state = make_state(deep)
    total, _, _ = engines.meta_gradients(deep, state, tasks, engine)
    summed = sum(flat(deep.meta_gradient(state, task)[0]) for task in tasks)
    assert flat(total).sub(summed).norm() <= 1e-9 * summed.norm()


@pytest.mark.quick("maml-*", "fedavg-*")
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_agree_on_scores_by_step(learner: Learner, engine: str) -> None:
    tasks = [make_task(seed, (4,), 3, support=3 + seed, query=6 - seed) for seed in range(3)]
    state = make_state(learner)
    figures = engines.evaluate(learner, state, tasks, engine, steps=3)
    scores, losses = figures["accuracy"], figures["loss"]
    steps = learner.evaluation_steps(3)
    assert scores.shape == losses.shape == (3, steps + 1)
    for site, task in enumerate(tasks):
        path = learner.adaptation_path(state, task.support, steps)
        expected = [learner.evaluate(own, task.query) for own in path]
        accuracy, loss = (torch.stack([each[name] for each in expected]).double() for name in ("accuracy", "loss"))
        assert torch.allclose(scores[site].double(), accuracy, atol=1e-6)
        assert torch.allclose(losses[site].double(), loss, rtol=1e-9)
