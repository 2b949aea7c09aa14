"""scaffold: corrected local steps, control variates, and the minimum that fedavg misses."""

import pytest
import torch
from torch import Tensor

from fedmeta.errors import FedmetaError
from fedmeta.learners import Learner, build
from fedmeta.learners.local_steps import order_of
from fedmeta.learners.scaffold import CONTROL
from fedmeta.models import build as build_model
from fedmeta.problems import Adam, Supervised
from fedmeta.task import Task

from .reference import (
    Quadratic,
    State,
    both,
    descend,
    flat,
    loss,
    make_regression,
    make_state,
    make_task,
    relative_error,
    theta_of,
)

LR, EPOCHS = 0.1, 4


def small(**settings: object) -> Learner:
    module = build_model("mlp", (4,), 3, hidden=(5,), activation="tanh")
    return build("scaffold", module, **{"inner_lr": LR, "local_epochs": EPOCHS, **settings})


def drawn(like: State, seed: int) -> State:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=draw, dtype=value.dtype) for name, value in like.items()}


def test_steps_are_corrected_and_the_change_of_the_control_variate_is_sent() -> None:
    learner, task = small(), make_task(0, (4,), 3)
    state = make_state(learner)
    theta, module, rows = theta_of(state), learner.network.module, both(task)
    assert all(float(state[CONTROL + name].abs().max()) == 0 for name in theta)
    control, own = drawn(theta, 1), drawn(theta, 2)
    state |= {CONTROL + name: value for name, value in control.items()}

    def corrected(p: State) -> Tensor:
        slope = sum(((control[name] - own[name]) * p[name]).sum() for name in p)
        return loss(module, p, rows) + slope

    y = descend(corrected, theta, lambda *_: LR, EPOCHS)
    after = {name: own[name] - control[name] + (theta[name] - y[name]) / (EPOCHS * LR) for name in theta}
    sent, figures, kept = learner.train(state, task, own)
    assert relative_error({name: sent[f"theta.{name}"] for name in theta}, {n: theta[n] - y[n] for n in theta}) < 1e-12
    assert relative_error(kept, after) < 1e-12
    change = {name: own[name] - after[name] for name in theta}
    assert relative_error({name: sent[CONTROL + name] for name in theta}, change) < 1e-12
    assert float(figures["query_loss"]) == pytest.approx(float(loss(module, y, task.query)))


def test_the_control_variate_is_the_mean_gradient_of_steps_that_have_rows() -> None:
    """12 rows in batches of 5 are three steps a pass; at a site without rows there are none, and c_i stays."""
    learner, task = small(batch_size=5, inner_lr=1e-6), make_task(0, (4,), 3)
    state, module = make_state(learner), learner.network.module
    _, _, kept = learner.train(state, task, learner.personal(state))
    theta, (x, y) = theta_of(state), both(task)
    batches = [places[places >= 0] for places in order_of(task, learner.minibatches).flatten(0, 1)]
    assert [len(places) for places in batches[:3]] == [5, 5, 2]
    first = [descend(lambda p, at=at: loss(module, p, (x[at], y[at])), theta, lambda *_: 1.0, 1) for at in batches]
    mean = {name: sum(theta[name] - each[name] for each in first) / len(batches) for name in theta}
    assert relative_error(kept, mean) < 1e-4, "they differ by what 12 steps of 1e-6 move"
    none = Task(*((x[:0], y[:0]) for x, y in task))
    own, state = drawn(kept, 3), {**state, **{CONTROL + name: value for name, value in drawn(kept, 4).items()}}
    sent, _, same = learner.train(state, none, own)
    assert relative_error(same, own) == 0
    assert float(flat(sent).abs().max()) == 0


@pytest.mark.slow
def test_many_local_steps_reach_the_common_minimum_and_those_of_fedavg_do_not() -> None:
    tasks = [make_regression(seed) for seed in (0, 5)]
    problems = [Quadratic(both(task)) for task in tasks]
    hessian, pull = (sum(getattr(each, name) for each in problems) for name in ("hessian", "pull"))
    minimum = torch.linalg.solve(hessian, pull)
    missed = {}
    for name in ("fedavg", "scaffold"):
        learner = build(name, build_model("logistic", (3,), 1), inner_lr=0.05, local_epochs=8, batch_size=0)
        state = make_state(learner)
        kept = [learner.personal(state) for _ in tasks]
        for _ in range(80):
            sent, _, kept = map(list, zip(*map(lambda t, k: learner.train(state, t, k), tasks, kept), strict=True))
            state = {key: value - (sent[0][key] + sent[1][key]) / 2 for key, value in state.items()}
        missed[name] = float((flat(learner.theta(state)) - minimum).norm())
    assert missed["scaffold"] < 1e-6
    assert missed["fedavg"] > 1e-3


def test_other_solvers_are_refused() -> None:
    class Momentous(Supervised):
        solver = Adam()

    with pytest.raises(FedmetaError, match="corrects plain gradient steps, and the solver Adam"):
        build("scaffold", Momentous(build_model("logistic", (4,), 3)))
