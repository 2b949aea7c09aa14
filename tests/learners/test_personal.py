"""Learners that keep a personal part: what they send, and what stays at the site."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

from fedmeta.errors import FedmetaError
from fedmeta.learners import LEARNERS, Learner, build
from fedmeta.models import build as build_model
from fedmeta.task import Rows, Task, stack

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

LR, STEPS, EPOCHS = 0.1, 3, 4
KEEPING = ("ditto", "fedrep", "fedper", "fedmeta-per", "apfl", "scaffold")
PERSONAL = tuple(name for name in KEEPING if name != "scaffold")
"""Those whose sites resume from what they kept when they adapt."""

HEAD, BODY = ["3.weight", "3.bias"], ["1.weight", "1.bias"]


def make(name: str, **settings: object) -> Learner:
    module = build_model("mlp", (4,), 3, hidden=(5,), activation="tanh")
    settings = {"inner_lr": LR, "inner_steps": STEPS, **settings}
    return build(
        name,
        module,
        **({"local_epochs": EPOCHS} if name in (*KEEPING, "fedavg") and name != "fedmeta-per" else {}),
        **settings,
    )


def moved(parameters: State) -> State:
    return {name: value + 0.3 for name, value in parameters.items()}


@pytest.mark.slow
def test_ditto_on_a_quadratic() -> None:
    task, lam, rate = make_regression(0, 3), 2.0, 0.15
    settings = {"inner_steps": 200, "local_epochs": 200, "inner_lr": rate, "lam": lam}
    learner = build("ditto", build_model("logistic", (3,), 1), **settings)
    state = make_state(learner)
    theta, problem = flat(learner.theta(state)), Quadratic(both(task))
    gradient, _, own = learner.train(state, task, moved(learner.personal(state)))
    minimum = torch.linalg.solve(problem.hessian, problem.pull)
    assert float((flat(gradient) - (theta - minimum)).norm()) < 1e-8, "theta_i is trained as in fedavg, unpulled"
    assert float((flat(own) - problem.proximal(theta, lam)).norm()) < 1e-12, "v solves the pulled problem"
    adapted = learner.adapt(state, task.support, personal=moved(own))
    assert float((flat(adapted) - Quadratic(task.support).proximal(theta, lam)).norm()) < 1e-12


def test_ditto_steps_from_its_own_model_around_the_theta_that_arrived() -> None:
    learner, task = make("ditto", lam=0.7), make_task(0, (4,), 3)
    state = make_state(learner)
    personal, theta = moved(learner.personal(state)), theta_of(state)
    gradient, figures, own = learner.train(state, task, personal)
    module, rows = learner.network.module, both(task)

    def pulled(p: State) -> Tensor:
        return loss(module, p, rows) + 0.35 * (flat(p) - flat(theta)).square().sum()

    expected = descend(pulled, personal, lambda *_: LR, EPOCHS)
    assert relative_error(own, expected) < 1e-12
    assert float(figures["query_loss"]) == pytest.approx(float(loss(module, expected, task.query)))
    fedavg, _ = make("fedavg").meta_gradient(state, task)
    assert relative_error(gradient, fedavg) == 0


@pytest.mark.parametrize("name", ["fedrep", "fedper"])
def test_the_head_stays_and_the_body_is_sent(name: str) -> None:
    learner, task = make(name, **({"body_steps": 2} if name == "fedrep" else {})), make_task(1, (4,), 3)
    state = make_state(learner)
    theta, module, rows = theta_of(state), learner.network.module, both(task)
    personal = moved(learner.personal(state))
    assert list(personal) == HEAD
    gradient, figures, head = learner.train(state, task, personal)
    start = {**theta, **personal}

    def objective(p: State) -> Tensor:
        return loss(module, p, rows)

    if name == "fedrep":
        fitted = descend(objective, start, lambda *_: LR, EPOCHS, HEAD)
        expected = descend(objective, fitted, lambda *_: LR, 2, BODY)
    else:
        expected = descend(objective, start, lambda *_: LR, EPOCHS)
    assert relative_error(head, {key: expected[key] for key in HEAD}) < 1e-12
    sent = {key: theta[key] - expected[key] for key in BODY}
    assert relative_error({key: gradient[f"theta.{key}"] for key in BODY}, sent) < 1e-12
    assert all(float(gradient[f"theta.{key}"].abs().max()) == 0 for key in HEAD), "nothing of the head is sent"
    assert float(figures["query_loss"]) == pytest.approx(float(loss(module, expected, task.query)))


@pytest.mark.parametrize("name", ["fedrep", "fedper"])
def test_a_head_is_fitted_to_support_on_a_fixed_body(name: str) -> None:
    learner, task = make(name), make_task(2, (4,), 3)
    state = make_state(learner)
    theta, module = theta_of(state), learner.network.module
    for personal in (None, moved(learner.personal(state))):
        start = {**theta, **(personal or {})}
        expected = descend(lambda p: loss(module, p, task.support), start, lambda *_: LR, STEPS, HEAD)
        assert relative_error(learner.adapt(state, task.support, personal=personal), expected) < 1e-12


@pytest.mark.parametrize("name", PERSONAL)
def test_a_path_starts_at_the_global_model_and_continues_from_the_personal_part(name: str) -> None:
    learner, task = make(name), make_task(3, (4,), 3)
    state = make_state(learner)
    personal = moved(learner.personal(state))
    path = learner.adaptation_path(state, task.support, 2, personal)
    assert len(path) == 3
    assert relative_error(path[0], learner.theta(state)) == 0
    assert relative_error(path[2], learner.adapt(state, task.support, 2, personal)) == 0
    assert relative_error(path[2], learner.adapt(state, task.support, 2)) > 1e-2
    assert relative_error(learner.adapt(state, task.support, 0, personal), learner.theta(state)) == 0


@pytest.mark.parametrize("name", KEEPING)
def test_the_first_round_needs_no_personal_part(name: str) -> None:
    learner, task = make(name), make_task(4, (4,), 3)
    state = make_state(learner)
    gradient, figures, own = learner.train(state, task, learner.personal(state))
    again, same = learner.meta_gradient(state, task)
    assert relative_error(again, gradient) == 0
    assert float(same["query_loss"]) == float(figures["query_loss"])
    assert own.keys() == learner.personal(state).keys()


@pytest.mark.parametrize("name", sorted(set(LEARNERS) - set(KEEPING)))
def test_other_learners_keep_nothing(name: str) -> None:
    learner, task = make(name), make_task(5, (4,), 3)
    state = make_state(learner)
    assert learner.personal(state) == {}
    gradient, _, own = learner.train(state, task, {})
    assert own == {}
    assert all(torch.equal(value, gradient[key]) for key, value in learner.meta_gradient(state, task)[0].items())


@pytest.mark.parametrize("name", [*KEEPING, "maml"])
def test_train_batches_over_sites(name: str) -> None:
    learner, tasks = make(name), [make_task(seed, (4,), 3, support=3 + seed) for seed in range(3)]
    state = make_state(learner)
    kept = [{key: value + k for key, value in learner.personal(state).items()} for k in range(3)]
    batch = stack(tasks)

    def site(support: Rows, query: Rows, personal: State) -> tuple[State, State, State]:
        return learner.train(state, Task(support, query), personal)

    stacked = {key: torch.stack([own[key] for own in kept]) for key in kept[0]}
    gradients, _, owns = vmap(site)(batch.support, batch.query, stacked)
    for k, task in enumerate(tasks):
        gradient, _, own = learner.train(state, task, kept[k])
        assert relative_error({key: value[k] for key, value in gradients.items()}, gradient) < 1e-10
        assert all(torch.allclose(owns[key][k], value, rtol=1e-10, atol=1e-12) for key, value in own.items())


def test_a_model_that_is_all_head_shares_nothing() -> None:
    task = make_task(6, (4,), 3)
    for module in (build_model("logistic", (4,), 3), nn.Linear(4, 3)):
        learner = build("fedrep", module, inner_lr=LR)
        state = make_state(learner)
        gradient, _, own = learner.train(state, task, learner.personal(state))
        assert float(flat(gradient).abs().max()) == 0
        assert relative_error(own, learner.personal(state)) > 1e-3


def test_the_head_may_be_named() -> None:
    assert list(make("fedper", head="1").personal(make("fedper").init(0))) == BODY
    with pytest.raises(FedmetaError, match='no layer "head" with parameters'):
        make("fedrep", head="head")
