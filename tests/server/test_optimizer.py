import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fedmeta.experiment import Server
from server.optimizer import DEFAULT_OPTIMIZERS, ServerOptimizer, resolve

OPTIMIZERS = ["sgd", "momentum", "adam", "adamw"]


def state(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "theta.weight": torch.randn(3, 2, generator=draw, dtype=dtype),
        "theta.bias": torch.randn(2, generator=draw, dtype=dtype),
        "alpha": torch.rand((), generator=draw, dtype=dtype),
    }


def by_hand(settings: Server, value: Tensor, gradients: list[Tensor]) -> Tensor:
    """The textbook's equations, one line each (Kingma & Ba 2015; Loshchilov & Hutter 2019)."""
    lr, decay = float(settings.lr), settings.weight_decay
    first, second = torch.zeros_like(value), torch.zeros_like(value)
    velocity: Tensor | None = None
    for step, gradient in enumerate(gradients, start=1):
        if settings.optimizer in ("sgd", "momentum"):
            gradient = gradient + decay * value
            momentum = settings.momentum if settings.optimizer == "momentum" else 0.0
            velocity = gradient if velocity is None else momentum * velocity + gradient
            value = value - lr * (velocity if momentum else gradient)
            continue
        if settings.optimizer == "adam":
            gradient = gradient + decay * value
        else:
            value = value - lr * decay * value
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        value = value - lr * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + Server().eps)
    return value


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_are_those_of_the_textbook(name: Any, decay: float) -> None:
    settings = Server(optimizer=name, lr=0.05, weight_decay=decay)
    start = state(0)
    optimizer = ServerOptimizer(settings, "gradient", start)
    gradients = [state(step) for step in range(1, 6)]
    for gradient in gradients:
        optimizer.step(gradient)
    reached = optimizer.meta_state
    for key, value in start.items():
        expected = by_hand(settings, value, [gradient[key] for gradient in gradients])
        assert torch.allclose(reached[key], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restored_steps_are_the_unbroken_ones_bit_for_bit(name: Any) -> None:
    settings = Server(optimizer=name, lr=0.05)
    unbroken, first = (ServerOptimizer(settings, "gradient", state(0, torch.float32)) for _ in range(2))
    for step in range(1, 4):
        unbroken.step(state(step, torch.float32))
        first.step(state(step, torch.float32))
    second = ServerOptimizer(settings, "gradient", state(99, torch.float32))
    second.restore(first.meta_state, first.state())
    for step in range(4, 8):
        unbroken.step(state(step))
        second.step(state(step))
        expected, reached = unbroken.meta_state, second.meta_state
        assert all(torch.equal(expected[key], reached[key]) for key in expected)
    memory, expected_memory = second.state(), unbroken.state()
    assert memory.keys() == expected_memory.keys()
    assert all(torch.equal(memory[key], value) for key, value in expected_memory.items())


def test_what_is_handed_in_and_out_is_a_copy() -> None:
    start = state(0)
    optimizer = ServerOptimizer(Server(optimizer="sgd", lr=1.0), "gradient", start)
    before = {key: value.clone() for key, value in start.items()}
    handed_out = optimizer.meta_state
    optimizer.step(state(1))
    assert all(torch.equal(start[key], before[key]) for key in start)
    assert all(torch.equal(handed_out[key], before[key]) for key in start)


@pytest.mark.parametrize("sends", DEFAULT_OPTIMIZERS)
def test_auto_is_what_suits_what_sites_send(sends: str) -> None:
    assert resolve(Server(), sends) == DEFAULT_OPTIMIZERS[sends]
    assert resolve(Server(optimizer="adamw", lr=0.5), sends) == ("adamw", 0.5)


def test_a_displacement_is_taken_whole() -> None:
    start, displacement = state(0), state(1)
    optimizer = ServerOptimizer(Server(), "delta", start)
    optimizer.step(displacement)
    reached = optimizer.meta_state
    assert all(torch.equal(reached[key], start[key] - displacement[key]) for key in start)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adamw"])
@pytest.mark.parametrize("size", [1.0, 1e11, 1e13, 1e20, 1e30, math.inf, math.nan])
def test_a_step_stands_where_it_is_finite_and_is_undone_where_not(name: str, size: float) -> None:
    settings = Server(optimizer=name, lr=0.5, weight_decay=0.01)
    start = {"theta": torch.tensor([1.0, -2.0]), "alpha": torch.tensor(0.5)}
    checked, plain = (ServerOptimizer(settings, "gradient", start) for _ in range(2))
    usual = {"theta": torch.tensor([0.5, 1.0]), "alpha": torch.tensor(-1.0)}
    for _ in range(3):
        assert checked.step_if_finite(usual)
        plain.step(usual)
    before = checked.meta_state, {key: value.clone() for key, value in checked.state().items()}
    large = {"theta": torch.tensor([size, 1.0], dtype=torch.float64), "alpha": torch.tensor(1.0)}
    stands = checked.step_if_finite(large)
    plain.step(large)
    expected = (plain.meta_state, plain.state()) if plain.finite else before
    assert stands is plain.finite
    for found, wanted in zip((checked.meta_state, checked.state()), expected, strict=True):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(value, wanted[key]) for key, value in found.items())
    assert checked.step_if_finite(usual)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_means_over_all_sites_move_by_the_share_of_a_round_and_no_optimizer_steps_them(name: Any) -> None:
    settings = Server(optimizer=name, lr=0.05, weight_decay=0.1)
    start = state(0) | {"control.weight": torch.full((3, 2), 2.0, dtype=torch.float64)}
    gradient = state(1) | {"control.weight": torch.full((3, 2), 0.4, dtype=torch.float64)}
    plain = ServerOptimizer(settings, "gradient", state(0))
    optimizer = ServerOptimizer(settings, "gradient", start, "control.")
    for _ in range(2):
        plain.step(state(1))
        assert optimizer.step_if_finite(gradient, 0.25)
    reached = optimizer.meta_state
    assert torch.allclose(reached["control.weight"], torch.full((3, 2), 1.8, dtype=torch.float64))
    assert all(torch.equal(reached[key], value) for key, value in plain.meta_state.items())
    assert not [key for key in optimizer.state() if key.startswith("control.")]
    other = ServerOptimizer(settings, "gradient", start, "control.")
    other.restore(reached, optimizer.state())
    for each in (optimizer, other):
        each.step(gradient, 0.25)
    assert all(torch.equal(value, other.meta_state[key]) for key, value in optimizer.meta_state.items())
    huge = gradient | {"control.weight": torch.full((3, 2), torch.inf, dtype=torch.float64)}
    before = optimizer.meta_state
    assert not optimizer.step_if_finite(huge, 0.25)
    assert all(torch.equal(value, before[key]) for key, value in optimizer.meta_state.items())
