"""What fedprox, reptile, per-fedavg, imaml and pfedme send, against closed forms and against each other."""

import pytest
import torch
from torch import Tensor, nn

from fedmeta.errors import FedmetaError
from fedmeta.learners import build
from fedmeta.models import build as build_model
from fedmeta.task import Task

from .reference import (
    Quadratic,
    both,
    central_differences,
    descend,
    flat,
    loss,
    make_regression,
    make_state,
    make_task,
    relative_error,
    theta_of,
)

LR, FEATURES = 0.05, 3
SOLVED = 200
"""Steps of rate 0.15 that solve the proximal problems here to the last bits."""


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-12) -> bool:
    return float((ours - theirs).norm()) <= tolerance * float(theirs.norm())


def on_quadratic(name: str, task: Task, **settings: object) -> tuple[Tensor, Tensor, Tensor]:
    """Returns theta, what the learner sends, and its adapted parameters, each as one vector."""
    learner = build(name, build_model("logistic", (FEATURES,), 1), **{"inner_lr": LR, **settings})
    state = make_state(learner)
    gradient, _ = learner.meta_gradient(state, task)
    return flat(learner.theta(state)), flat(gradient), flat(learner.adapt(state, task.support))


def proximal_steps(problem: Quadratic, anchor: Tensor, weight: float, steps: int) -> Tensor:
    w = anchor
    for _ in range(steps):
        w = w - LR * (problem.gradient(w) + weight * (w - anchor))
    return w


@pytest.fixture
def task() -> Task:
    return make_regression(0, FEATURES)


def small_mlp() -> nn.Module:
    return build_model("mlp", (4,), 3, hidden=(5,), activation="tanh")


@pytest.mark.parametrize("steps", [1, 4])
def test_reptile_sends_what_fedavg_sends_and_adapts(steps: int) -> None:
    task = make_task(0, (4,), 3)
    settings = {"local_epochs": steps, "batch_size": 4, "inner_lr": LR}
    reptile, fedavg = (build(name, small_mlp(), **settings) for name in ("reptile", "fedavg"))
    state = make_state(reptile)
    assert relative_error(reptile.meta_gradient(state, task)[0], fedavg.meta_gradient(state, task)[0]) == 0
    assert relative_error(reptile.adapt(state, task.support), fedavg.theta(state)) > 1e-3
    assert relative_error(fedavg.adapt(state, task.support), fedavg.theta(state)) == 0


def test_fedprox_pulls_in_training_and_not_at_evaluation(task: Task) -> None:
    theta, sent, own = on_quadratic("fedprox", task, mu=2.0, inner_steps=6, local_epochs=7)
    assert close(sent, theta - proximal_steps(Quadratic(both(task)), theta, 2.0, 7))
    assert close(own, Quadratic(task.support).after(theta, LR, 6))
    _, sent, _ = on_quadratic("fedprox", task, mu=2.0, local_epochs=SOLVED, inner_lr=0.15)
    assert close(sent, theta - Quadratic(both(task)).proximal(theta, 2.0))
    _, plain, _ = on_quadratic("fedavg", task, local_epochs=6)
    assert close(on_quadratic("fedprox", task, mu=0.0, local_epochs=6)[1], plain)


@pytest.mark.parametrize("lam", [0.5, 3.0])
def test_imaml_is_the_exact_implicit_gradient(task: Task, lam: float) -> None:
    theta, sent, own = on_quadratic("imaml", task, lam=lam, inner_steps=SOLVED, inner_lr=0.15, cg_steps=FEATURES + 1)
    support, query = Quadratic(task.support), Quadratic(task.query)
    phi = support.proximal(theta, lam)
    exact = torch.linalg.solve(torch.eye(FEATURES + 1) + support.hessian / lam, query.gradient(phi))
    assert close(own, phi, 1e-10)
    assert close(sent, exact, 1e-9)
    # The same by differentiating the solution: phi = (H + lam I)^-1 (c + lam theta).
    assert close(exact, lam * torch.linalg.solve(support.hessian + lam * torch.eye(FEATURES + 1), query.gradient(phi)))


@pytest.mark.slow
def test_more_conjugate_gradients_come_closer_and_stop_there(task: Task) -> None:
    exact = on_quadratic("imaml", task, inner_steps=SOLVED, inner_lr=0.15, cg_steps=FEATURES + 1)[1]
    errors = [
        float((on_quadratic("imaml", task, inner_steps=SOLVED, inner_lr=0.15, cg_steps=k)[1] - exact).norm())
        for k in (1, 2, 3, 12)
    ]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-10 * float(exact.norm())


@pytest.mark.slow
def test_imaml_is_the_derivative_of_its_solution_on_a_network() -> None:
    """On a curved loss, solved to the end, against finite differences of the query loss at the solution."""
    module, task = build_model("mlp", (2,), 2, hidden=(2,), activation="tanh"), make_task(3, (2,), 2)
    learner = build("imaml", module, inner_steps=60, inner_lr=0.8, lam=0.6, cg_steps=14)
    state = make_state(learner)

    def objective(own: dict[str, Tensor]) -> Tensor:
        theta = theta_of(own)

        def pulled(p: dict[str, Tensor]) -> Tensor:
            return loss(module, p, task.support) + 0.3 * (flat(p) - flat(theta)).square().sum()

        return loss(module, descend(pulled, theta, lambda *_: 0.8, 60), task.query)

    assert relative_error(learner.meta_gradient(state, task)[0], central_differences(objective, state)) < 1e-6


def test_imaml_survives_negative_curvature() -> None:
    learner = build("imaml", small_mlp(), lam=1e-4, cg_steps=50, inner_steps=1, inner_lr=2.0)
    state = {name: 5 * value for name, value in make_state(learner).items()}
    for seed in range(5):
        assert bool(flat(learner.meta_gradient(state, make_task(seed, (4,), 3))[0]).isfinite().all())


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [1, 3])
def test_pfedme_descends_the_moreau_envelope(task: Task, rounds: int) -> None:
    lam, rate = 2.0, 0.2
    settings = {"lam": lam, "local_steps": rounds, "local_lr": rate}
    theta, sent, own = on_quadratic("pfedme", task, inner_steps=SOLVED, inner_lr=0.15, **settings)
    problem, w = Quadratic(both(task)), theta
    for _ in range(rounds):
        w = w - rate * lam * (w - problem.proximal(w, lam))
    assert close(sent, theta - w, 1e-10)
    assert close(own, Quadratic(task.support).proximal(theta, lam), 1e-10)
    _, sent, own = on_quadratic("pfedme", task, inner_steps=4, **settings)
    w = theta
    for _ in range(rounds):
        w = w - rate * lam * (w - proximal_steps(problem, w, lam, 4))
    assert close(sent, theta - w)
    assert close(own, proximal_steps(Quadratic(task.support), theta, lam, 4))


def test_one_step_of_pfedme_is_the_envelopes_gradient(task: Task) -> None:
    """Against finite differences of min over phi of L(phi) + lam / 2 |phi - w|^2 itself."""
    theta, sent, _ = on_quadratic(
        "pfedme", task, inner_steps=SOLVED, inner_lr=0.15, lam=2.0, local_steps=1, local_lr=0.1
    )
    problem = Quadratic(both(task))

    def envelope(own: dict[str, Tensor]) -> Tensor:
        w = own["w"]
        phi = problem.proximal(w, 2.0)
        return phi @ problem.hessian @ phi / 2 - problem.pull @ phi + (phi - w).square().sum()

    assert close(sent / 0.1, central_differences(envelope, {"w": theta})["w"], 1e-8)


@pytest.mark.parametrize("hessian", ["exact", "free"])
def test_per_fedavg_takes_maml_steps(task: Task, hessian: str) -> None:
    theta, sent, own = on_quadratic("per-fedavg", task, local_steps=3, local_lr=0.2, hessian=hessian)
    support, query, w = Quadratic(task.support), Quadratic(task.query), theta
    for _ in range(3):
        w = w - 0.2 * support.contraction(LR) @ query.gradient(support.after(w, LR, 1))
    assert close(sent, theta - w, 1e-12 if hessian == "exact" else 1e-9)
    assert close(own, support.after(theta, LR, 1)), "one step at evaluation"


def test_per_fedavg_of_first_order_leaves_the_hessian_out(task: Task) -> None:
    theta, sent, _ = on_quadratic("per-fedavg", task, local_steps=2, local_lr=0.2, hessian="first-order")
    support, query, w = Quadratic(task.support), Quadratic(task.query), theta
    for _ in range(2):
        w = w - 0.2 * query.gradient(support.after(w, LR, 1))
    assert close(sent, theta - w)


def test_one_local_step_of_per_fedavg_is_maml_of_one_step() -> None:
    task = make_task(1, (4,), 3)
    for hessian, name in (("exact", "maml"), ("first-order", "fomaml")):
        per = build("per-fedavg", small_mlp(), inner_lr=0.3, local_steps=1, local_lr=0.5, hessian=hessian)
        maml = build(name, small_mlp(), inner_lr=0.3, inner_steps=1)
        state = make_state(maml)
        (ours, figures), (theirs, expected) = per.meta_gradient(state, task), maml.meta_gradient(state, task)
        assert relative_error(ours, {key: 0.5 * value for key, value in theirs.items()}) < 1e-12
        assert float(figures["query_loss"]) == pytest.approx(float(expected["query_loss"]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 2e-3)])
def test_the_free_hessian_is_close_to_the_exact_one(dtype: torch.dtype, tolerance: float) -> None:
    task = make_task(2, (4,), 3)
    exact, free, first = (
        build("per-fedavg", small_mlp(), inner_lr=0.5, local_steps=4, local_lr=0.3, hessian=hessian)
        for hessian in ("exact", "free", "first-order")
    )
    state = make_state(exact)
    theirs = exact.meta_gradient(state, task)[0]
    own = {key: value.to(dtype) for key, value in state.items()}
    rows = Task(*((x.to(dtype), y) for x, y in task))
    assert relative_error(free.meta_gradient(own, rows)[0], theirs) < tolerance
    assert relative_error(first.meta_gradient(own, rows)[0], theirs) > 1e-2


def test_settings_that_cannot_be() -> None:
    with pytest.raises(FedmetaError, match=r'learner\.hessian = "fre": no such form; did you mean "free"'):
        build("per-fedavg", small_mlp(), hessian="fre")
    for name in ("imaml", "pfedme"):
        with pytest.raises(FedmetaError, match=r"learner\.lam = 0.*greater than 0"):
            build(name, small_mlp(), lam=0.0)
