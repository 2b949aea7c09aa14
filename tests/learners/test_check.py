"""Exact is compared with something independent: derivatives that all engines would have wrong are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedmeta import Task, engines, run
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.learners import build
from fedmeta.learners.check import check
from fedmeta.learners.maml import Maml


class SquareOnce(torch.autograd.Function):
    """A square whose derivative has none itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(context, inputs, output) -> None:
        context.save_for_backward(inputs[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, gradient: Tensor) -> Tensor:
        return 2 * context.saved_tensors[0] * gradient


class Rounded(torch.autograd.Function):
    """A straight-through estimator: values are rounded, derivatives pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.round(4 * x) / 4

    @staticmethod
    def setup_context(context, inputs, output) -> None: ...

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        return gradient


class Around(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.body(x)))


def weight_norm(shape: tuple[int, ...] = (4,), outputs: int = 3) -> nn.Module:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(shape[0], 6))
    return nn.Sequential(normed, nn.Tanh(), nn.Linear(6, outputs))


def once(shape: tuple[int, ...] = (4,), outputs: int = 3) -> nn.Module:
    return Around(SquareOnce.apply)


def rounded(shape: tuple[int, ...] = (4,), outputs: int = 3) -> nn.Module:
    return Around(Rounded.apply)


def tasks(count: int = 3) -> list[Task]:
    random = torch.Generator().manual_seed(0)

    def rows(n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(n, 4, generator=random), torch.randint(0, 3, (n,), generator=random)

    return [Task(rows(6), rows(4)) for _ in range(count)]


WRONG = {"weight_norm": weight_norm, "once_differentiable": once, "straight through": rounded}
REASON = "differs from a finite difference|derivative for .* not implemented|once_differentiable"


@pytest.mark.parametrize("name", ["maml", "anil", "meta-sgd", "maml++", "imaml", "per-fedavg"])
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_second_derivative_is_refused(case: str, name: str) -> None:
    if case != "straight through" and name == "anil":
        pytest.skip("its inner loop moves the head, where derivatives are right")
    learner = build(name, WRONG[case], inner_lr=0.3, inner_steps=3)
    with pytest.raises(FedmetaError, match=REASON):
        check(learner, tasks())


@pytest.mark.quick("*-auto")
@pytest.mark.parametrize("engine", ["auto", "loop", "vmap", "lowrank"])
@pytest.mark.parametrize("case", WRONG)
def test_so_it_is_by_every_engine_unless_a_named_setting_lets_it_through(case: str, engine: str) -> None:
    learner = build("maml", WRONG[case], inner_lr=0.3)
    own = learner.init(0)
    for _ in range(2):
        with pytest.raises(FedmetaError, match=REASON):
            engines.meta_gradients(learner, own, tasks(), engine)
    if case != "once_differentiable":
        _, weight, _ = engines.meta_gradients(learner, own, tasks(), engine, check="straight-through")
        assert weight == 3


@pytest.mark.parametrize("name", ["fomaml", "fedavg", "reptile"])
def test_learners_that_need_no_second_derivative_take_what_has_a_right_first_one(name: str) -> None:
    for case in (weight_norm, once):
        found = check(build(name, case), tasks())
        assert any("the inner objective's gradient agrees" in line for line in found.passed)
        assert any("sends no exact gradient" in line for line in found.skipped)
    with pytest.raises(FedmetaError, match="the inner objective's gradient differs"):
        check(build(name, rounded), tasks())


KINKED = {
    "relu": nn.ReLU(),
    "leaky": nn.LeakyReLU(0.3),
    "hard": nn.Hardtanh(-0.1, 0.1),
    "shrink": nn.Softshrink(0.01),
    "largest": nn.Sequential(nn.Unflatten(1, (1, 6)), nn.MaxPool1d(3, stride=1, padding=1), nn.Flatten()),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("case", KINKED)
def test_a_kink_is_no_wrong_derivative(case: str, seed: int) -> None:
    found = check(build("maml", Around(KINKED[case]), inner_steps=3), tasks(), seed)
    assert any("the meta-gradient agrees" in line for line in found.passed)


def test_a_learner_that_sends_something_of_its_own_is_named_and_not_refused() -> None:
    class Doubled(Maml):
        def meta_gradient(self, meta_state, task):
            gradient, figures = super().meta_gradient(meta_state, task)
            return {name: 2 * value for name, value in gradient.items()}, figures

    found = check(Doubled(weightless()), tasks())
    assert any("Doubled sends something else than the gradient of its query loss" in line for line in found.skipped)
    with pytest.raises(FedmetaError, match="the inner objective's second derivative differs"):
        check(Doubled(weight_norm()), tasks())


def weightless() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def test_a_planted_error_in_an_own_learners_path_is_refused() -> None:
    class Detached(Maml):
        def adaptation_path(self, meta_state, support, steps, personal=None):
            path = super().adaptation_path(meta_state, support, steps)
            theta = self.theta(meta_state)
            moved = {name: theta[name] + (value - theta[name]).detach() for name, value in path[-1].items()}
            return [*path[:-1], moved]

    with pytest.raises(FedmetaError, match="the meta-gradient differs from a finite difference"):
        check(Detached(weightless(), inner_lr=0.5), tasks())


def described(folder: Path, *overrides: str) -> Experiment:
    random = np.random.default_rng(0)
    np.savez(folder / "sites.npz", x=random.normal(size=(60, 4)), y=np.arange(60) % 3, site=np.arange(60) % 5)
    usual = ("data.source=npz", f"data.path={folder / 'sites.npz'}", "server.rounds=1", "tracking.uri=none")
    return Experiment().with_overrides([*usual, f"tracking.folder={folder / 'runs'}", *overrides])


@pytest.mark.slow
def test_a_run_refuses_it_before_its_first_round_and_reports_what_it_does_not_verify(tmp_path: Path) -> None:
    own = described(tmp_path, "model.name=tests.learners.test_check:weight_norm", "learner.inner_lr=0.3")
    with pytest.raises(FedmetaError, match="differs from a finite difference") as raised:
        run(own)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "runs").exists()
    notes: list[str] = []
    let_through = own.with_overrides(["runtime.check=straight-through"])
    assert run(let_through, report=lambda progress: notes.append(progress.note)).summary["failures"] == 0
    assert any("straight-through" in note for note in notes)


class Raises(Maml):
    """A learner with a mistake that only its sites meet."""

    def meta_gradient(self, meta_state, task):
        raise ValueError("my own mistake")


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_a_run_whose_sites_cannot_compute_never_ends_well(engine: str, tmp_path: Path) -> None:
    named = "learner.name=tests.learners.test_check:Raises"
    with pytest.raises(FedmetaError, match="Raises: meta_gradient failed: ValueError: my own mistake"):
        run(described(tmp_path, named, f"runtime.engine={engine}"))
    unchecked = described(tmp_path, named, f"runtime.engine={engine}", "runtime.check=off")
    with pytest.raises(FedmetaError, match="bad-experiment"):
        run(unchecked)
    with pytest.raises(FedmetaError, match=r"none of 1 rounds had a usable reply: .*bad-experiment"):
        run(unchecked.with_overrides(["runtime.engine=loop", "runtime.memory=0.1"]))


def test_a_short_run_in_which_every_site_diverges_never_ends_well(tmp_path: Path) -> None:
    with pytest.raises(FedmetaError, match=r"none of 1 rounds had a usable reply: .*learner\.inner_lr"):
        run(described(tmp_path, "learner.inner_lr=1e30", "model.activation=gelu"))


def head_alone() -> nn.Module:
    return nn.Linear(4, 3)


class Constant(nn.Module):
    """A model whose outputs do not depend on its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return 0 * self.head(x)


@pytest.mark.parametrize("name", ["fedper", "fedrep", "fedmeta-per"])
def test_a_learner_all_of_whose_model_stays_at_the_site_is_named_and_not_refused(name: str) -> None:
    found = check(build(name, head_alone, inner_steps=2), tasks())
    assert any("keeps all that it trains at the site here, and sends zeros" in line for line in found.skipped)
    with pytest.raises(FedmetaError, match="sends zeros at every site that was tried, and learns nothing"):
        check(build(name, Constant, inner_steps=2), tasks())


def test_a_learner_that_keeps_nothing_and_sends_zeros_is_refused() -> None:
    with pytest.raises(FedmetaError, match="FedBabu sends zeros at every site that was tried, and learns nothing"):
        check(build("fedbabu", head_alone, inner_steps=2), tasks())
