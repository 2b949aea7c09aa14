"""How a site solves its inner problem: a path of parameters from the start that it was sent.

A solver is `differentiable` (learners differentiate through its steps), `implicit` (its solution is differentiated by
the implicit function theorem, through `Problem.residual`), or a `black box` (no derivative; for learners that send a
difference of parameters, and for payloads).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import grad

from fedmeta.errors import FedmetaError
from fedmeta.noise import at_step
from fedmeta.problems.implicit_function import implicit
from fedmeta.problems.problem import Data, Parameters, Problem

Objective = Callable[[Parameters], Tensor]
"""A scalar function of parameters."""

Rates = Mapping[str, Tensor | float]
"""The rate of each parameter that moves; the others stay where they are."""

DIFFERENTIABLE, IMPLICIT, BLACK_BOX = "differentiable", "implicit", "black box"


class Solver(ABC):
    """How a site solves its inner problem."""

    kind: ClassVar[str] = DIFFERENTIABLE

    memoryless: ClassVar[bool] = False
    """Whether K steps are K times one step, so that each may have its own rates."""

    @property
    def evaluations(self) -> int:
        """How many evaluations of the objective, a gradient counted as one, a step takes."""
        return 1

    @abstractmethod
    def solve(self, problem: Problem, parameters: Parameters, data: Data, steps: int, rates: Rates) -> list[Parameters]:
        """Returns the parameters after 0, 1, ... `steps` steps.

        Args:
            problem: What is solved; its `inner` is the objective, constraints applied.
            parameters: The start.
            data: The site's data.
            steps: The number of steps.
            rates: The rate of each parameter that moves.
        """


def gradient(objective: Objective, parameters: Parameters, names: Container[str]) -> Parameters:
    """Returns the gradient of an objective by the named parameters."""
    fixed = {name: value for name, value in parameters.items() if name not in names}
    moving = {name: value for name, value in parameters.items() if name in names}
    found: Parameters = grad(lambda own: objective({**fixed, **own}))(moving)
    return found


class _FirstOrder(Solver):
    """A method that steps along a direction made of the gradient and a memory of it."""

    @abstractmethod
    def direction(self, found: Parameters, memory: Any, step: int) -> tuple[Parameters, Any]:
        """Returns what is subtracted, before the rate, and the memory for the next step (None at first)."""

    def solve(self, problem: Problem, parameters: Parameters, data: Data, steps: int, rates: Rates) -> list[Parameters]:
        """Returns the path of `steps` steps phi <- phi - rate * direction."""
        path, memory = [parameters], None
        for step in range(steps):
            own = path[-1]
            with at_step(step):
                slope = gradient(lambda p: problem.inner(p, data), own, rates)
            found, memory = self.direction(slope, memory, step)
            path.append({name: v - rates[name] * found[name] if name in rates else v for name, v in own.items()})
        return path


@dataclass(frozen=True)
class Descent(_FirstOrder):
    """Gradient descent: phi <- phi - rate * d inner(phi) / d phi; ascent with the sign +.

    Attributes:
        sign: 1 to descend, -1 to ascend.
    """

    memoryless: ClassVar[bool] = True
    sign: float = 1.0

    def direction(self, found: Parameters, memory: Any, step: int) -> tuple[Parameters, Any]:
        """Returns the gradient itself, or its negative."""
        return (found if self.sign == 1.0 else {name: self.sign * value for name, value in found.items()}), None


@dataclass(frozen=True)
class Clipped(_FirstOrder):
    """Gradient descent with gradients no longer than `max_norm`, over all parameters together (Pascanu et al. 2013).

    Attributes:
        max_norm: The longest gradient that is used as it is.
    """

    memoryless: ClassVar[bool] = True
    max_norm: float = 1.0

    def direction(self, found: Parameters, memory: Any, step: int) -> tuple[Parameters, Any]:
        """Returns the gradient times min(1, max_norm / norm)."""
        square = torch.stack([value.square().sum() for value in found.values()]).sum()
        # The square root has no derivative at zero, where the factor is 1 whatever it is.
        norm = torch.where(square > 0, square, 1.0).sqrt()
        factor = torch.where(square > self.max_norm**2, self.max_norm / norm, 1.0)
        return {name: factor * value for name, value in found.items()}, None


@dataclass(frozen=True)
class Momentum(_FirstOrder):
    """Heavy-ball descent: m <- beta * m + gradient (Polyak 1964).

    Attributes:
        beta: How much of the memory is kept in each step.
    """

    beta: float = 0.9

    def direction(self, found: Parameters, memory: Any, step: int) -> tuple[Parameters, Any]:
        """Returns the memory with the gradient added."""
        new = found if memory is None else {name: self.beta * memory[name] + value for name, value in found.items()}
        return new, new


@dataclass(frozen=True)
class Adam(_FirstOrder):
    """Adam (Kingma and Ba 2015, algorithm 1); differentiable, with its epsilon under the root.

    Attributes:
        beta1: Decay of the mean of gradients.
        beta2: Decay of the mean of their squares.
        eps: Added to the mean of squares, so that the root has a derivative at zero.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def direction(self, found: Parameters, memory: Any, step: int) -> tuple[Parameters, Any]:
        """Returns the corrected mean over the root of the corrected mean of squares."""
        zeros = {name: torch.zeros_like(value) for name, value in found.items()}
        mean, square = memory or (zeros, zeros)
        mean = {n: self.beta1 * mean[n] + (1 - self.beta1) * v for n, v in found.items()}
        square = {n: self.beta2 * square[n] + (1 - self.beta2) * v.square() for n, v in found.items()}
        one, two = 1 - self.beta1 ** (step + 1), 1 - self.beta2 ** (step + 1)
        return {n: mean[n] / one / (square[n] / two + self.eps).sqrt() for n in found}, (mean, square)


@dataclass(frozen=True)
class ClosedForm(Solver):
    """A solution by formula, in one step: `problem.solution(parameters, data)` returns the moved parameters."""

    def solve(self, problem: Problem, parameters: Parameters, data: Data, steps: int, rates: Rates) -> list[Parameters]:
        """Returns the start, and the solution after every further step."""
        if not steps:
            return [parameters]
        own = {**parameters, **getattr(problem, "solution")(parameters, data)}  # noqa: B009
        return [parameters, *[own] * steps]


@dataclass(frozen=True)
class OptimalityCriteria(Solver):
    """Optimality criteria for a cost that falls with each variable, whose sum is fixed (Bendsoe and Sigmund 2003).

    x <- clip(x (-s / lambda)^damping),  lambda such that the sum of x stays as it is

    with s = `problem.sensitivity(parameters, data)`, the cost's derivative by each variable as if the sum were free,
    often filtered so that it is no gradient. The rate is the longest move of a variable in a step. The steps are
    differentiable, lambda by the implicit function theorem: what is differentiated is the map that the solver is. The
    start is `constrain`ed first, which must leave allowed variables as they are (a projection).

    Attributes:
        damping: The exponent.
        lowest: The least value of a variable.
        highest: The greatest.
    """

    memoryless: ClassVar[bool] = True
    damping: float = 0.5
    lowest: float = 1e-3
    highest: float = 1.0

    def solve(self, problem: Problem, parameters: Parameters, data: Data, steps: int, rates: Rates) -> list[Parameters]:
        """Returns the path of `steps` steps."""
        if not hasattr(problem, "sensitivity"):
            raise FedmetaError(
                "the solver OptimalityCriteria needs the problem's sensitivity(parameters, data): the derivative of "
                "the cost by each variable that moves"
            )
        path = [parameters]
        for _ in range(steps):
            own = problem.constrain(path[-1])
            found = getattr(problem, "sensitivity")(own, data)  # noqa: B009
            shapes = {name: own[name].shape for name in rates}
            x = torch.cat([own[name].reshape(-1) for name in shapes])
            benefit = torch.cat([-found[name].reshape(-1) for name in shapes])
            moves = torch.cat(
                [torch.as_tensor(rates[n], dtype=x.dtype).expand(shape).reshape(-1) for n, shape in shapes.items()]
            )
            parts = torch.split(self._step(x, benefit, moves), [shape.numel() for shape in shapes.values()])
            path.append({**own, **{n: v.reshape(shapes[n]) for n, v in zip(shapes, parts, strict=True)}})
        return path

    def _step(self, x: Tensor, benefit: Tensor, moves: Tensor) -> Tensor:
        least = benefit.detach().max() * 1e-15
        grown = x * benefit.clamp(min=least) ** self.damping
        low, high = (x - moves).clamp(min=self.lowest), (x + moves).clamp(max=self.highest)

        def at(multiplier: Tensor) -> Tensor:
            return torch.minimum(torch.maximum(grown * multiplier, low), high)

        # A root in log of multiplier = lambda^-damping, by bisection; it is monotonic.
        total, rough = x.detach().sum(), grown.detach()
        bottom = torch.log(low.detach().min() / rough.max())
        top = torch.log(high.detach().max() / rough.min())
        for _ in range(60):
            middle = (bottom + top) / 2
            beyond = torch.minimum(torch.maximum(rough * middle.exp(), low.detach()), high.detach()).sum() > total
            bottom, top = torch.where(beyond, bottom, middle), torch.where(beyond, middle, top)
        root = ((bottom + top) / 2).exp()
        # One Newton step from the root changes no value and carries its derivative.
        free = (rough * root > low.detach()) & (rough * root < high.detach())
        slope = (rough * free).sum()
        return at(root - torch.where(slope > 0, (at(root).sum() - x.sum()) / torch.where(slope > 0, slope, 1.0), 0.0))


@dataclass(frozen=True)
class CrossEntropy(Solver):
    """The cross-entropy method (Rubinstein 1999): sample, keep the elite, fit a normal distribution. A black box.

    Attributes:
        samples: Candidates per step.
        elite: How many of them the next distribution is fitted to.
        spread: The first standard deviation, in units of the rate.
    """

    kind: ClassVar[str] = BLACK_BOX
    samples: int = 32
    elite: int = 8
    spread: float = 1.0

    @property
    def evaluations(self) -> int:
        """Returns the number of candidates of a step."""
        return self.samples

    def solve(self, problem: Problem, parameters: Parameters, data: Data, steps: int, rates: Rates) -> list[Parameters]:
        """Returns the means of `steps` fits; draws are keyed by `data["seed"]` where there is one, else by 0."""
        seed = data.get("seed", 0) if isinstance(data, Mapping) else 0
        generator = torch.Generator().manual_seed(int(seed))
        mean = {name: parameters[name] for name in rates}
        deviation = {name: torch.full_like(value, self.spread) * rates[name] for name, value in mean.items()}
        path = [parameters]
        for _ in range(steps):
            drawn = {
                n: v + deviation[n] * torch.randn(self.samples, *v.shape, generator=generator, dtype=v.dtype)
                for n, v in mean.items()
            }
            each = [{**parameters, **{n: v[k] for n, v in drawn.items()}} for k in range(self.samples)]
            best = torch.stack([problem.inner(own, data) for own in each]).argsort()[: self.elite]
            mean = {name: value[best].mean(0) for name, value in drawn.items()}
            deviation = {name: value[best].std(0) for name, value in drawn.items()}
            path.append({**parameters, **mean})
        return path


@dataclass(frozen=True)
class GaussianProcessSearch(Solver):
    """Bayesian optimization over a list of settings, under a learned prior (Srinivas et al. 2010). A black box.

    response(setting) = features[setting] . w,   w ~ N(mean, factor factor^T),   outcome = response + noise

    Each step tries the setting of the greatest mean + kappa * deviation, asks for its outcome, and conditions. The
    problem has parameters `mean` [q] (moved: the posterior's) and `factor` [q, q] (shared), a tensor `features`
    [settings, q], and `observe(data, setting, trial)`, which returns a noisy outcome. The path's entries also hold
    `tried` [trials], the settings so far.

    Attributes:
        kappa: How much an uncertain setting is worth trying (standard deviations).
        noise: Standard deviation of an outcome's noise.
        memory: After how many trials responses have drifted by 1 - 1/e from what they were; infinite for no drift.
        limit: Responses that are not to be fallen below; None for none.
        confidence: By how many standard deviations a setting's mean must be above the limit for it to be tried.
    """

    kind: ClassVar[str] = BLACK_BOX
    kappa: float = 1.0
    noise: float = 0.1
    memory: float = float("inf")
    limit: float | None = None
    confidence: float = 2.33

    def solve(self, problem: Problem, parameters: Parameters, data: Data, steps: int, rates: Rates) -> list[Parameters]:
        """Returns the path of `steps` trials; rates do not matter."""
        features, observe = getattr(problem, "features"), getattr(problem, "observe")  # noqa: B009
        start, prior = parameters["mean"], parameters["factor"] @ parameters["factor"].mT
        mean, covariance = start, prior
        tried: list[int] = []
        path, kept = [parameters], math.exp(-1 / self.memory)
        for trial in range(steps):
            expected = features @ mean
            deviation = ((features @ covariance) * features).sum(1).clamp(min=0).sqrt()
            worth = expected + self.kappa * deviation
            if self.limit is not None:
                safe = expected - self.confidence * deviation >= self.limit
                # Where none is safe enough, the safest.
                worth = worth.masked_fill(~safe, -torch.inf) if bool(safe.any()) else expected - 3 * deviation
            setting = int(worth.argmax())
            tried.append(setting)
            row = features[setting]
            gain = covariance @ row / (row @ covariance @ row + self.noise**2)
            mean = mean + gain * (observe(data, setting, trial) - row @ mean)
            covariance = covariance - torch.outer(gain, covariance @ row)
            mean = start + kept * (mean - start)
            covariance = kept**2 * covariance + (1 - kept**2) * prior
            path.append({**parameters, "mean": mean, "tried": torch.tensor(tried)})
        return path


descent = Descent()
"""Gradient descent, the default."""

ascent = Descent(sign=-1.0)
"""Gradient ascent."""


class WithObjective(Problem):
    """A problem as a solver sees it: constraints applied to its inner objective, or another objective in its place."""

    def __init__(self, problem: Problem, objective: Callable[[Parameters, Data], Tensor]) -> None:
        self._problem = problem
        self._objective = objective

    def init(self, seed: int) -> Parameters:
        """Returns the problem's own start."""
        return self._problem.init(seed)

    def inner(self, parameters: Parameters, data: Data) -> Tensor:
        """Returns the objective."""
        return self._objective(parameters, data)

    def __getattribute__(self, name: str) -> Any:
        """Returns the wrapped problem's attribute, but for `inner`."""
        if name in ("inner", "_problem", "_objective", "__class__"):
            return object.__getattribute__(self, name)
        return getattr(object.__getattribute__(self, "_problem"), name)


def run_solver(
    problem: Problem,
    objective: Callable[[Parameters, Data], Tensor],
    start: Parameters,
    data: Data,
    rates: Callable[[int], Rates],
    steps: int,
) -> list[Parameters]:
    """Returns the path of a problem's solver.

    Args:
        problem: The problem.
        objective: What is descended in place of its inner objective, constraints applied.
        start: The parameters at the start.
        data: The site's data.
        rates: The rates of each step, from 0.
        steps: The number of steps.

    Raises:
        FedmetaError: Rates change from step to step, and the solver has a memory.
    """
    solver, view = problem.solver, WithObjective(problem, objective)
    if solver.memoryless:
        path = [start]
        for step in range(steps):
            with at_step(step):
                path.append(solver.solve(view, path[-1], data, 1, rates(step))[-1])
        return path
    own = rates(0)
    if any(other is not own and dict(other) != dict(own) for other in map(rates, range(1, steps)) if _plain(other)):
        raise FedmetaError(f"{type(solver).__name__} keeps a memory between steps and takes one rate for all of them")
    if solver.kind == IMPLICIT and steps:
        return [start, *[implicit(view, start, data, steps, own)] * steps]
    return solver.solve(view, start, data, steps, own)


def _plain(rates: Rates) -> bool:
    return not any(isinstance(rate, Tensor) for rate in rates.values())
