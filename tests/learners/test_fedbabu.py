"""fedbabu: the body moves in training, the head at the site."""

import pytest

from fedmeta.errors import FedmetaError
from fedmeta.learners import build
from fedmeta.models import build as build_model

from .reference import both, descend, flat, loss, make_state, make_task, relative_error, theta_of

LR, STEPS, EPOCHS = 0.1, 3, 4
HEAD, BODY = ["3.weight", "3.bias"], ["1.weight", "1.bias"]
SETTINGS = {"inner_lr": LR, "inner_steps": STEPS, "local_epochs": EPOCHS}


def test_the_body_is_trained_and_the_head_is_tuned() -> None:
    learner = build("fedbabu", build_model("mlp", (4,), 3, hidden=(5,), activation="tanh"), **SETTINGS)
    state, task = make_state(learner), make_task(1, (4,), 3)
    theta, module, rows = theta_of(state), learner.network.module, both(task)
    trained = descend(lambda p: loss(module, p, rows), theta, lambda *_: LR, EPOCHS, BODY)
    gradient, figures = learner.meta_gradient(state, task)
    sent = {name: theta[name] - trained[name] for name in BODY}
    assert relative_error({name: gradient[f"theta.{name}"] for name in BODY}, sent) < 1e-12
    assert all(float(gradient[f"theta.{name}"].abs().max()) == 0 for name in HEAD), "the head moves at no site"
    assert float(figures["query_loss"]) == pytest.approx(float(loss(module, trained, task.query)))
    tuned = descend(lambda p: loss(module, p, task.support), theta, lambda *_: LR, STEPS, HEAD)
    assert relative_error(learner.adapt(state, task.support), tuned) < 1e-12


def test_a_model_that_is_all_head_trains_nothing_and_a_head_may_be_named() -> None:
    task = make_task(6, (4,), 3)
    learner = build("fedbabu", build_model("logistic", (4,), 3), **SETTINGS)
    state = make_state(learner)
    assert float(flat(learner.meta_gradient(state, task)[0]).abs().max()) == 0
    assert relative_error(learner.adapt(state, task.support), learner.theta(state)) > 1e-3
    with pytest.raises(FedmetaError, match='no layer "head" with parameters'):
        build("fedbabu", build_model("logistic", (4,), 3), head="head")
