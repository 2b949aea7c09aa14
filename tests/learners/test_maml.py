"""maml's gradient is exact, and fomaml's is what its paper says."""

import pytest
import torch
from torch import nn

from fedmeta.learners import build
from fedmeta.models import build as build_model
from fedmeta.task import Task

from .reference import (
    central_differences,
    descend,
    flat,
    loss,
    make_state,
    make_task,
    padded,
    relative_error,
    theta_of,
)

LR = 0.3
TOLERANCE = 1e-6


def small_mlp(norm: str = "none") -> nn.Module:
    return build_model("mlp", (4,), 3, hidden=(5,), activation="tanh", norm=norm)


def small_cnn(norm: str = "none") -> nn.Module:
    return build_model("cnn", (6, 6), 3, channels=(2, 3), kernel=3, dense=4, activation="tanh", norm=norm)


MODELS = {"mlp": (small_mlp, (4,)), "cnn": (small_cnn, (6, 6))}


@pytest.mark.quick("0.0-mlp-1", "0.4-mlp-*")
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("global_weight", [0.0, 0.4])
def test_maml_against_finite_differences(name: str, steps: int, global_weight: float) -> None:
    make, shape = MODELS[name]
    module = make()
    learner = build("maml", module, inner_steps=steps, inner_lr=LR, global_weight=global_weight)
    state, task = make_state(learner), make_task(1, shape, 3)

    def objective(own: dict[str, torch.Tensor]) -> torch.Tensor:
        theta = theta_of(own)
        adapted = descend(lambda p: loss(module, p, task.support), theta, lambda *_: LR, steps)
        return (1 - global_weight) * loss(module, adapted, task.query) + global_weight * loss(module, theta, task.query)

    gradient, metrics = learner.meta_gradient(state, task)
    assert relative_error(gradient, central_differences(objective, state)) < TOLERANCE
    adapted = descend(lambda p: loss(module, p, task.support), theta_of(state), lambda *_: LR, steps)
    assert float(metrics["query_loss"]) == pytest.approx(float(loss(module, adapted, task.query)), rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_maml_with_norms_and_padding_against_finite_differences(name: str) -> None:
    module = small_mlp("layer") if name == "mlp" else small_cnn("group")
    learner = build("maml", module, inner_steps=2, inner_lr=LR)
    state, plain = make_state(learner), make_task(2, MODELS[name][1], 3, support=4, query=3)
    task = Task(padded(plain.support, 2), padded(plain.query, 3))

    def objective(own: dict[str, torch.Tensor]) -> torch.Tensor:
        adapted = descend(lambda p: loss(module, p, plain.support), theta_of(own), lambda *_: LR, 2)
        return loss(module, adapted, plain.query)

    gradient, _ = learner.meta_gradient(state, task)
    assert relative_error(gradient, central_differences(objective, state)) < TOLERANCE


def test_maml_on_conv4_and_char_lstm_against_finite_differences() -> None:
    """In some directions: the element by element is the small networks' business."""
    image, text = make_task(7, (16, 16), 3, support=3, query=3), make_task(8, (5,), 4, support=3, query=3)
    codes = Task(*((x.abs().mul(2).long().clamp(max=3), y) for x, y in text))
    models = {
        "conv4": (build_model("conv4", (16, 16), 3, filters=4, activation="tanh"), image),
        "char_lstm": (build_model("char_lstm", (5,), 4, hidden=(3, 3), embedding=2), codes),
    }
    for module, task in models.values():
        learner = build("maml", module, inner_steps=2, inner_lr=LR)
        state = make_state(learner)
        gradient = flat(learner.meta_gradient(state, task)[0])
        draw = torch.Generator().manual_seed(0)
        for _ in range(4):
            way = {name: torch.randn(value.shape, generator=draw).double() for name, value in state.items()}

            def along(own: dict[str, torch.Tensor], way=way, state=state, module=module, task=task) -> torch.Tensor:
                theta = theta_of({name: value + own["t"] * way[name] for name, value in state.items()})
                adapted = descend(lambda p: loss(module, p, task.support), theta, lambda *_: LR, 2)
                return loss(module, adapted, task.query)

            slope = central_differences(along, {"t": torch.zeros((), dtype=torch.float64)})["t"]
            assert float(gradient @ flat(way)) == pytest.approx(float(slope), rel=TOLERANCE)


@pytest.mark.parametrize("steps", [1, 4])
def test_adapt_is_plain_gradient_descent(steps: int) -> None:
    module, task = small_mlp(), make_task(3, (4,), 3)
    learner = build("maml", module, inner_steps=steps, inner_lr=LR)
    state = make_state(learner)
    expected = descend(lambda p: loss(module, p, task.support), theta_of(state), lambda *_: LR, steps)
    assert relative_error(learner.adapt(state, task.support), expected) < 1e-12
    assert relative_error(learner.adapt(state, task.support, steps=0), theta_of(state)) == 0


def test_fomaml_is_the_query_gradient_at_the_adapted_parameters() -> None:
    module, task = small_mlp(), make_task(4, (4,), 3)
    learner = build("fomaml", module, inner_steps=3, inner_lr=LR, global_weight=0.25)
    state = make_state(learner)
    theta = theta_of(state)
    adapted = descend(lambda p: loss(module, p, task.support), theta, lambda *_: LR, 3)
    # One step of rate 1 from a point displaces by minus the gradient there.
    at_adapted, at_theta = (
        {name: start[name] - value for name, value in moved.items()}
        for start in (adapted, theta)
        for moved in [descend(lambda p: loss(module, p, task.query), start, lambda *_: 1.0, 1)]
    )
    expected = {f"theta.{name}": 0.75 * at_adapted[name] + 0.25 * at_theta[name] for name in theta}
    gradient, _ = learner.meta_gradient(state, task)
    assert relative_error(gradient, expected) < 1e-12


def test_maml_is_fomaml_times_one_minus_lr_hessian() -> None:
    module, task = small_mlp(), make_task(5, (4,), 3)
    maml, fomaml = (build(name, module, inner_steps=1, inner_lr=LR) for name in ("maml", "fomaml"))
    state = make_state(maml)
    theta = theta_of(state)

    def on_vector(vector: torch.Tensor) -> torch.Tensor:
        parts = vector.split([value.numel() for value in theta.values()])
        own = {name: part.reshape(theta[name].shape) for name, part in zip(theta, parts, strict=True)}
        return loss(module, own, task.support)

    hessian = torch.autograd.functional.hessian(on_vector, flat(theta))
    first_order, exact = flat(fomaml.meta_gradient(state, task)[0]), flat(maml.meta_gradient(state, task)[0])
    expected = first_order - LR * hessian @ first_order
    assert float((exact - expected).norm() / expected.norm()) < 1e-11
    assert float((exact - first_order).norm() / exact.norm()) > 1e-2
