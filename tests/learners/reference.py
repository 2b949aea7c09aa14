"""Learners' quantities by other means: plain autograd, finite differences, and matrices of a quadratic."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from fedmeta.learners import Learner
from fedmeta.task import Rows, Task

State = dict[str, Tensor]
Rates = Callable[[str, int], Tensor | float]


def make_task(seed: int, shape: tuple[int, ...], classes: int, support: int = 7, query: int = 5) -> Task:
    """A task of random rows in float64."""
    draw = torch.Generator().manual_seed(seed)

    def rows(count: int) -> Rows:
        x = torch.randn(count, *shape, generator=draw, dtype=torch.float64)
        return x, torch.randint(classes, (count,), generator=draw)

    return Task(rows(support), rows(query))


def both(task: Task) -> Rows:
    """All rows of a task."""
    return torch.cat([task.support[0], task.query[0]]), torch.cat([task.support[1], task.query[1]])


def padded(rows: Rows, extra: int) -> Rows:
    """Rows with padding that would change every result if it were not masked out."""
    x, y = rows
    junk = torch.full((extra, *x.shape[1:]), 3.0, dtype=x.dtype).to(x.dtype)
    mask = torch.cat([torch.ones(len(y), dtype=torch.float64), torch.zeros(extra, dtype=torch.float64)])
    return torch.cat([x, junk]), torch.cat([y, torch.zeros(extra, dtype=y.dtype)]), mask


def make_state(learner: Learner, seed: int = 0) -> State:
    """The initial meta-state in float64, its learned rates moved apart."""
    draw = torch.Generator().manual_seed(seed)
    state = {name: value.double() for name, value in learner.init(seed).items()}
    return {
        name: value + 0.05 * torch.randn(value.shape, generator=draw, dtype=torch.float64)
        if name.startswith("alpha.")
        else value
        for name, value in state.items()
    }


def theta_of(state: Mapping[str, Tensor]) -> State:
    return {name.removeprefix("theta."): value for name, value in state.items() if name.startswith("theta.")}


def loss(module: nn.Module, parameters: State, rows: Rows) -> Tensor:
    """The mean loss over the rows that are no padding."""
    x, y = rows[0], rows[1]
    if len(rows) == 3:
        x, y = x[rows[2] > 0], y[rows[2] > 0]
    outputs = functional_call(module, parameters, (x,))
    return (
        functional.mse_loss(outputs.reshape(y.shape), y)
        if y.is_floating_point()
        else functional.cross_entropy(outputs, y)
    )


def descend(
    objective: Callable[[State], Tensor], start: State, rates: Rates, steps: int, names: Sequence[str] | None = None
) -> State:
    """Gradient descent by autograd on leaves, on the parameters `names` (None: all), without a graph through steps."""
    own = dict(start)
    for step in range(steps):
        leaves = {name: value.detach().clone().requires_grad_() for name, value in own.items()}
        moving = [name for name in own if names is None or name in names]
        slopes = torch.autograd.grad(objective(leaves), [leaves[name] for name in moving])
        for name, slope in zip(moving, slopes, strict=True):
            own[name] = own[name] - rates(name, step) * slope
    return own


def central_differences(objective: Callable[[State], Tensor], state: State, step: float = 1e-5) -> State:
    """The derivative of a scalar function of a state, element by element."""
    gradient = {}
    for name, value in state.items():
        slope = torch.zeros(value.numel(), dtype=value.dtype)
        for index in range(value.numel()):
            nudge = torch.zeros(value.numel(), dtype=value.dtype)
            nudge[index] = step
            nudge = nudge.reshape(value.shape)
            up, down = objective({**state, name: value + nudge}), objective({**state, name: value - nudge})
            slope[index] = (up - down) / (2 * step)
        gradient[name] = slope.reshape(value.shape)
    return gradient


def flat(values: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([value.reshape(-1) for value in values.values()])


def relative_error(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The norm of the difference over the norm of the second, over all keys."""
    assert set(ours) == set(theirs)
    reference = flat({name: theirs[name] for name in ours})
    return float((flat(ours) - reference).norm() / reference.norm())


class Quadratic:
    """The mean squared error of a linear model on rows: L(w) = w'Hw/2 - c'w + constant, with w = (weights, bias)."""

    def __init__(self, rows: Rows) -> None:
        x, y = rows[0], rows[1]
        design = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
        self.hessian = 2 / len(x) * design.T @ design
        self.pull = 2 / len(x) * design.T @ y

    def gradient(self, w: Tensor) -> Tensor:
        return self.hessian @ w - self.pull

    def contraction(self, lr: float) -> Tensor:
        """What one gradient step multiplies a displacement of its start by: I - lr H."""
        return torch.eye(len(self.pull), dtype=self.pull.dtype) - lr * self.hessian

    def after(self, w: Tensor, lr: float, steps: int) -> Tensor:
        """Where `steps` gradient steps lead, by the geometric series around the minimum."""
        minimum = torch.linalg.solve(self.hessian, self.pull)
        return minimum + torch.linalg.matrix_power(self.contraction(lr), steps) @ (w - minimum)

    def proximal(self, anchor: Tensor, weight: float) -> Tensor:
        """The minimum of L(w) + weight/2 |w - anchor|^2."""
        identity = torch.eye(len(self.pull), dtype=self.pull.dtype)
        return torch.linalg.solve(self.hessian + weight * identity, self.pull + weight * anchor)


def make_regression(seed: int, features: int = 3, support: int = 8, query: int = 6) -> Task:
    """A task of noisy linear rows in float64."""
    draw = torch.Generator().manual_seed(seed)

    def rows(count: int) -> Rows:
        x = torch.randn(count, features, generator=draw, dtype=torch.float64)
        return x, torch.randn(count, generator=draw, dtype=torch.float64) + x.sum(1)

    return Task(rows(support), rows(query))
