"""On a quadratic every learner has a closed form, written out here in matrices."""

import pytest
import torch
from torch import Tensor

from fedmeta.learners import build
from fedmeta.models import build as build_model
from fedmeta.task import Rows, Task

from .reference import Quadratic, flat, make_regression, make_state

LR, STEPS, FEATURES = 0.07, 4, 3


def both(task: Task) -> Rows:
    return torch.cat([task.support[0], task.query[0]]), torch.cat([task.support[1], task.query[1]])


def sent(name: str, task: Task, **settings: object) -> tuple[Tensor, Tensor, Tensor]:
    """Returns theta, what the learner sends, and its adapted parameters, each as one vector."""
    settings = {"inner_steps": STEPS, "inner_lr": LR} | settings
    learner = build(name, build_model("logistic", (FEATURES,), 1), **settings)
    state = make_state(learner)
    gradient, _ = learner.meta_gradient(state, task)
    assert list(gradient) == list(state)
    return flat(learner.theta(state)), flat(gradient), flat(learner.adapt(state, task.support))


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-12) -> bool:
    return float((ours - theirs).norm()) <= tolerance * float(theirs.norm())


@pytest.fixture
def task() -> Task:
    return make_regression(0, FEATURES)


def test_local_sends_nothing_and_trains_on_its_support(task: Task) -> None:
    theta, gradient, own = sent("local", task)
    assert float(gradient.abs().max()) == 0
    assert close(own, Quadratic(task.support).after(theta, LR, STEPS))


@pytest.mark.parametrize(("name", "adapts"), [("fedavg", False), ("fedavg-ft", True)])
def test_fedavg_sends_its_displacement(task: Task, name: str, adapts: bool) -> None:
    theta, displacement, own = sent(name, task, local_epochs=STEPS + 2)
    assert close(displacement, theta - Quadratic(both(task)).after(theta, LR, STEPS + 2))
    assert close(own, Quadratic(task.support).after(theta, LR, STEPS) if adapts else theta)


def test_one_step_of_fedavg_is_lr_times_the_gradient_of_all_rows(task: Task) -> None:
    theta, displacement, _ = sent("fedavg", task, local_epochs=1)
    assert close(displacement, LR * Quadratic(both(task)).gradient(theta))


def test_fomaml_is_the_query_gradient_after_adaptation(task: Task) -> None:
    theta, gradient, own = sent("fomaml", task)
    adapted = Quadratic(task.support).after(theta, LR, STEPS)
    assert close(own, adapted)
    assert close(gradient, Quadratic(task.query).gradient(adapted))


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_maml_is_the_gradient_through_the_contraction(task: Task, weight: float) -> None:
    theta, gradient, _ = sent("maml", task, global_weight=weight)
    support, query = Quadratic(task.support), Quadratic(task.query)
    through = torch.linalg.matrix_power(support.contraction(LR), STEPS)
    exact = through.T @ query.gradient(support.after(theta, LR, STEPS))
    assert close(gradient, (1 - weight) * exact + weight * query.gradient(theta))
