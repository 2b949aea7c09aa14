"""apfl: two models, their mixture, and what stays."""

import pytest
import torch
from torch import Tensor

from fedmeta.errors import FedmetaError
from fedmeta.learners import Learner, build
from fedmeta.learners.apfl import MIXTURE, OWN
from fedmeta.models import build as build_model

from .reference import State, both, descend, loss, make_state, make_task, relative_error, theta_of

LR, STEPS, EPOCHS = 0.1, 3, 4


def make(name: str = "apfl", **settings: object) -> Learner:
    module = build_model("mlp", (4,), 3, hidden=(5,), activation="tanh")
    return build(name, module, **{"inner_lr": LR, "inner_steps": STEPS, "local_epochs": EPOCHS, **settings})


def mix(share: Tensor, own: State, other: State) -> State:
    return {name: share * value + (1 - share) * other[name] for name, value in own.items()}


def slopes(objective: Tensor, leaves: State) -> State:
    return dict(zip(leaves, torch.autograd.grad(objective, list(leaves.values())), strict=True))


def leaves(values: State) -> State:
    return {name: value.detach().clone().requires_grad_() for name, value in values.items()}


def test_both_models_and_their_share_step_as_in_the_paper() -> None:
    learner, task = make(), make_task(0, (4,), 3)
    state = make_state(learner)
    w, module, rows = theta_of(state), learner.network.module, both(task)
    assert float(learner.personal(state)[MIXTURE]) == 0.5
    v, share = {name: value + 0.3 for name, value in w.items()}, torch.tensor(0.6, dtype=torch.float64)
    sent, figures, kept = learner.train(
        state, task, {**{OWN + name: value for name, value in v.items()}, MIXTURE: share}
    )
    for step in range(EPOCHS):
        mixed, plain = leaves(mix(share, v, w)), leaves(w)
        along, own = slopes(loss(module, mixed, rows), mixed), slopes(loss(module, plain, rows), plain)
        turn = sum(((v[name] - w[name]) * along[name]).sum() for name in w)
        v = {name: value - LR * share * along[name] for name, value in v.items()}
        w = {name: value - LR * own[name] for name, value in w.items()}
        share = share - LR * turn if step == 0 else share
    assert float(share) != 0.6
    assert float(kept[MIXTURE]) == pytest.approx(float(share), rel=1e-10)
    assert relative_error({name: kept[OWN + name] for name in v}, v) < 1e-12
    fedavg, _ = make("fedavg").meta_gradient(state, task)
    assert relative_error(sent, fedavg) < 1e-12
    assert float(figures["query_loss"]) == pytest.approx(float(loss(module, mix(share, v, w), task.query)))


def test_a_site_adapts_its_own_model_under_the_mixture() -> None:
    learner, task = make(), make_task(1, (4,), 3)
    state = make_state(learner)
    theta, module = theta_of(state), learner.network.module
    share, v = torch.tensor(0.7, dtype=torch.float64), {name: value + 0.2 for name, value in theta.items()}
    kept = {**{OWN + name: value for name, value in v.items()}, MIXTURE: share}
    own = descend(lambda p: loss(module, mix(share, p, theta), task.support), v, lambda *_: LR, STEPS)
    assert relative_error(learner.adapt(state, task.support, personal=kept), mix(share, own, theta)) < 1e-12
    alone = make(mixture=1.0).adapt(state, task.support)
    assert relative_error(alone, make("fedavg-ft").adapt(state, task.support)) < 1e-12


def test_a_share_outside_its_range_is_refused_and_one_that_runs_out_stays_there() -> None:
    for share in (0.0, 1.5):
        with pytest.raises(FedmetaError, match=r"learner\.mixture"):
            make(mixture=share)
    learner, task = make(inner_lr=50.0, local_epochs=1), make_task(2, (4,), 3)
    state = make_state(learner)
    for shift in (-0.5, 0.5):
        personal = {
            name: value if name == MIXTURE else value + shift for name, value in learner.personal(state).items()
        }
        assert 0 <= float(learner.train(state, task, personal)[2][MIXTURE]) <= 1
