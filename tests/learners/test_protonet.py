"""protonet: the head against distances, and the gradient through prototypes against finite differences."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedmeta.errors import FedmetaError
from fedmeta.learners import Learner, build
from fedmeta.learners.order import has_first_order
from fedmeta.models import build as build_model
from fedmeta.task import Task

from .reference import central_differences, flat, make_regression, make_state, make_task, padded, relative_error

CLASSES = 3


def make(name: str = "mlp", shape: tuple[int, ...] = (4,), **settings: object) -> Learner:
    model = build_model(name, shape, CLASSES, hidden=(5,), activation="tanh", filters=2)
    return build("protonet", model, **settings)


def with_every_class(seed: int, shape: tuple[int, ...] = (4,)) -> Task:
    (x, _), query = make_task(seed, shape, CLASSES)
    return Task((x, torch.arange(len(x)) % CLASSES), query)


def features(learner: Learner, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """What enters the model's last layer."""
    seen: list[Tensor] = []
    last = [layer for layer in learner.network.module.modules() if isinstance(layer, nn.Linear)][-1]
    hook = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    functional_call(learner.network.module, parameters, (x,))
    hook.remove()
    return seen[0]


@pytest.mark.parametrize(("model", "shape"), [("mlp", (4,)), ("conv4", (16, 16))])
def test_a_row_belongs_to_the_nearest_mean_of_features(model: str, shape: tuple[int, ...]) -> None:
    learner, task = make(model, shape), with_every_class(0, shape)
    state = make_state(learner)
    theta, ((x, y), (other, _)) = learner.theta(state), task
    support, query = features(learner, theta, x), features(learner, theta, other)
    means = torch.stack([support[y == k].mean(0) for k in range(CLASSES)])
    distances = torch.cdist(query, means).square()
    ours = learner.predict(learner.adapt(state, task.support), other)
    assert torch.allclose(ours.softmax(-1), (-distances).softmax(-1), rtol=1e-9, atol=1e-12)
    same = learner.adapt(state, padded(task.support, 3), 4)
    assert relative_error(same, learner.adapt(state, task.support)) < 1e-12, (
        "padding is no row, and steps change nothing"
    )


@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_the_gradient_is_that_of_the_query_loss_with_prototypes(weight: float) -> None:
    learner, task = make(global_weight=weight), with_every_class(1)
    state = make_state(learner)

    def objective(own: dict[str, Tensor]) -> Tensor:
        adapted = learner.outer(learner.adapt(own, task.support), task.query)
        return (1 - weight) * adapted + weight * learner.outer(learner.theta(own), task.query)

    ours, figures = learner.meta_gradient(state, task)
    assert relative_error(ours, central_differences(objective, state)) < 1e-6
    assert float(figures["query_loss"]) == pytest.approx(
        float(learner.outer(learner.adapt(state, task.support), task.query))
    )
    body = {name: value for name, value in ours.items() if name.startswith("theta.1.")}
    assert float(flat(body).norm()) > 1e-3, "the body is trained through the prototypes"


def test_a_class_without_support_rows_keeps_its_row_of_theta() -> None:
    learner, task = make(), with_every_class(2)
    state = make_state(learner)
    (x, y), theta = task.support, learner.theta(state)
    own = learner.adapt(state, (x[y != 1], y[y != 1]))
    whole = learner.adapt(state, task.support)
    for name in learner.head_names:
        assert torch.equal(own[name][1], theta[name][1])
        assert torch.allclose(own[name][[0, 2]], whole[name][[0, 2]])
        assert not torch.allclose(own[name][0], theta[name][0])


def test_what_cannot_be_is_refused() -> None:
    numbers = build("protonet", build_model("mlp", (3,), 1, hidden=(4,)))
    with pytest.raises(FedmetaError, match="needs classes, and the targets are numbers"):
        numbers.meta_gradient(make_state(numbers), make_regression(0))
    with pytest.raises(FedmetaError, match=r"a linear head with a bias.*Conv1d"):
        build("protonet", nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 3, 1)))
    assert not has_first_order(make())
