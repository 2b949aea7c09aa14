"""fedmeta-per: the body's meta-gradient is sent, the head takes its own meta-step and stays."""

import pytest
from torch import Tensor

from fedmeta.learners import Learner, build
from fedmeta.learners.order import has_first_order
from fedmeta.models import build as build_model

from .reference import central_differences, descend, loss, make_state, make_task, relative_error, theta_of

LR, LOCAL_LR = 0.2, 0.5
HEAD = ["3.weight", "3.bias"]


def make(name: str, **settings: object) -> Learner:
    module = build_model("mlp", (4,), 3, hidden=(5,), activation="tanh")
    return build(name, module, **{"inner_lr": LR, "inner_steps": 2, **settings})


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_body_and_head_step_along_the_query_loss_after_adapting_both(weight: float) -> None:
    learner, task = make("fedmeta-per", local_lr=LOCAL_LR, global_weight=weight), make_task(0, (4,), 3)
    state = make_state(learner)
    personal = {name: value + 0.3 for name, value in learner.personal(state).items()}
    assert list(personal) == HEAD
    start, module = {**theta_of(state), **personal}, learner.network.module

    def objective(own: dict[str, Tensor]) -> Tensor:
        adapted = descend(lambda p: loss(module, p, task.support), own, lambda *_: LR, 2)
        return (1 - weight) * loss(module, adapted, task.query) + weight * loss(module, own, task.query)

    exact = central_differences(objective, start)
    sent, figures, head = learner.train(state, task, personal)
    body = {name: value for name, value in exact.items() if name not in HEAD}
    assert relative_error({name: sent[f"theta.{name}"] for name in body}, body) < 1e-6
    assert all(float(sent[f"theta.{name}"].abs().max()) == 0 for name in HEAD), "nothing of the head is sent"
    moved = {name: (personal[name] - head[name]) / LOCAL_LR for name in HEAD}
    assert relative_error(moved, {name: exact[name] for name in HEAD}) < 1e-6
    adapted = learner.adapt(state, task.support, personal=personal)
    assert relative_error(adapted, descend(lambda p: loss(module, p, task.support), start, lambda *_: LR, 2)) < 1e-12
    assert float(figures["query_loss"]) == pytest.approx(float(loss(module, adapted, task.query)))


def test_a_site_without_a_head_is_one_of_maml() -> None:
    per, maml, task = make("fedmeta-per"), make("maml"), make_task(1, (4,), 3)
    state = make_state(maml)
    ours, theirs = per.meta_gradient(state, task)[0], maml.meta_gradient(state, task)[0]
    body = [name for name in ours if name.removeprefix("theta.") not in HEAD]
    assert relative_error({name: ours[name] for name in body}, {name: theirs[name] for name in body}) < 1e-12
    assert relative_error(per.adapt(state, task.support), maml.adapt(state, task.support)) == 0
    assert not has_first_order(per)
