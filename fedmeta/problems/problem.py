"""What a problem is: parameters, an inner objective that a site descends, an outer one that scores, and metrics.

phi = solver(theta; inner(., support))   what a site does with its own data
outer(phi, query)                        how good that is, and what the federation learns theta by

Rows with labels are one problem among others (`fedmeta.problems.Supervised`). Parameters are real tensors; complex
arithmetic and Fourier transforms are allowed inside objectives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeGuard

import torch
from torch import Tensor

from fedmeta.errors import FedmetaError, nearest
from fedmeta.problems.metric import Metric

if TYPE_CHECKING:
    from fedmeta.problems.solvers import Solver

Parameters = dict[str, Tensor]
"""A problem's parameters by name."""

Data = Any
"""What a site adapts on or is scored by: a tensor, or a tree (dictionaries, tuples, lists) of tensors."""

RESERVED = ("theta.", "alpha.", "control.", "frozen.", "standardisation.")


class Problem(ABC):
    """One inner problem per site, each over the same parameters. Subclass it; only `init` and `inner` are required.

    Attributes:
        metrics: What sites are scored by; the first is the score.
        shared: Parameters that the federation learns and no inner loop moves, such as a light source or a prior.
        frozen: Parameters that travel and are never trained, such as a random layer or buffers.
        solver: How a site solves its inner problem; gradient descent unless set.
    """

    metrics: Sequence[Metric] = (Metric("loss", higher_is_better=False),)
    shared: Sequence[str] = ()
    frozen: Sequence[str] = ()
    solver: Solver

    on_rows: ClassVar[bool] = False
    """Whether data are rows (x, y, mask) of a network, which the low-rank engine and step selection know."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Gives each subclass the default solver."""
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "solver"):
            from fedmeta.problems.solvers import descent

            cls.solver = descent

    @abstractmethod
    def init(self, seed: int) -> Parameters:
        """Returns initial parameters, drawn from `seed` alone: everything that outputs depend on."""

    @abstractmethod
    def inner(self, parameters: Parameters, data: Data) -> Tensor:
        """Returns the scalar that a site descends; differentiable twice for exact meta-gradients."""

    def outer(self, parameters: Parameters, data: Data) -> Tensor:
        """Returns the scalar that scores adapted parameters; the inner objective unless overridden."""
        return self.inner(parameters, data)

    def all_data(self, parameters: Parameters, support: Data, query: Data) -> Tensor:
        """Returns the objective on all of a task's data, for learners that do not split it: the mean of both."""
        return (self.inner(parameters, support) + self.inner(parameters, query)) / 2

    def evaluate(self, parameters: Parameters, data: Data) -> dict[str, Tensor]:
        """Returns each metric's value, a scalar; by default the outer objective under the first one's name."""
        return {self.metrics[0].name: self.outer(parameters, data)}

    def constrain(self, parameters: Parameters) -> Parameters:
        """Returns allowed parameters: a differentiable map onto a box, a simplex or a symmetry; identity by default.

        Objectives see only its result; what is learned, sent and averaged stays unconstrained.
        """
        return parameters

    def residual(self, solution: Parameters, parameters: Parameters, data: Data) -> Parameters:
        """Returns what is zero at an implicit solver's solution, with the keys and shapes of the moved parameters.

        Args:
            solution: The moved parameters at the solution.
            parameters: All parameters at the start, shared and frozen ones included.
            data: The site's data.
        """
        raise NotImplementedError(f"{type(self).__name__} has an implicit solver and no residual")

    def classical(self, parameters: Parameters, data: Data) -> tuple[Parameters, int] | None:
        """Returns what the field's own method makes of one site's data, or None: a rival, reported beside the scores.

        Args:
            parameters: The run's initial parameters, constrained.
            data: The site's support data.

        Returns:
            Parameters as objectives see them, and how many evaluations of the objective they took.
        """
        return None

    def optimum(self, parameters: Parameters, data: Data) -> Parameters | None:
        """Returns the best parameters there are, or None: the known optimum, which no site can know by itself.

        Args:
            parameters: The run's initial parameters, constrained.
            data: The site's query data, which otherwise only scores.
        """
        return None

    def picture(self, parameters: Parameters, data: Data) -> Any:
        """Returns an image [height, width] or [height, width, 3] of a solution, or None."""
        return None

    @cached_property
    def layout(self) -> Mapping[str, torch.Size]:
        """The shape of each parameter.

        Raises:
            FedmetaError: `init` does not return a dictionary of real tensors, or a name is unknown or reserved.
        """
        found = self.init(0)
        name = type(self).__name__
        if not isinstance(found, dict) or not found or not all(isinstance(v, Tensor) for v in found.values()):
            raise FedmetaError(f"problem {name}: init must return a dictionary of at least one tensor")
        for key, value in found.items():
            if value.is_complex():
                raise FedmetaError(
                    f'problem {name}: parameter "{key}" is complex; keep its real and imaginary parts as two real '
                    "parameters and combine them by torch.complex in the objective"
                )
            if key.startswith(RESERVED):
                raise FedmetaError(f'problem {name}: parameter "{key}" has a reserved prefix; rename it')
        for what in ("shared", "frozen"):
            for key in getattr(self, what):
                if key not in found:
                    raise FedmetaError(
                        f'problem {name}: {what} names "{key}", which init does not return{nearest(key, found)}'
                    )
        trained = [key for key in found if key not in self.frozen]
        for key in trained:
            if not found[key].is_floating_point():
                raise FedmetaError(f'problem {name}: parameter "{key}" holds whole numbers; list it in frozen')
        if not [key for key in trained if key not in self.shared]:
            raise FedmetaError(f"problem {name}: every parameter is shared or frozen; the inner loop moves none")
        return {key: value.shape for key, value in found.items()}

    @cached_property
    def known(self) -> dict[Hashable, Any]:
        """What was found out about the problem once, such as which engines compute it."""
        return {}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all parameters."""
        return tuple(self.layout)

    @cached_property
    def trained(self) -> tuple[str, ...]:
        """The names of the parameters that the federation learns: all but the frozen ones."""
        return tuple(name for name in self.layout if name not in self.frozen)

    @cached_property
    def moved(self) -> tuple[str, ...]:
        """The names of the parameters that the inner loop moves."""
        return tuple(name for name in self.trained if name not in self.shared)

    def layer(self, name: str = "") -> tuple[str, ...]:
        """Returns the moved parameters of a layer, and of all layers in it.

        Args:
            name: A parameter's name, or what such names begin with before a dot; empty for the last layer.

        Raises:
            FedmetaError: There is no such layer.
        """
        last = self.moved[-1].rpartition(".")[0]
        if not name and not last:
            return self.moved[-1:] if not self.on_rows else tuple(own for own in self.moved if "." not in own)
        names = tuple(own for own in self.moved if own == name or own.startswith((name or last) + "."))
        if not names:
            layers = sorted({own.rpartition(".")[0] or own for own in self.moved})
            raise FedmetaError(
                f'the model has no layer "{name}" with parameters{nearest(name, layers)} (it has: {", ".join(layers)})'
            )
        return names


def has_picture(problem: Problem) -> bool:
    """Returns whether a problem draws its solutions."""
    return type(problem).picture is not Problem.picture


def own_baselines(problem: Problem) -> tuple[str, ...]:
    """Returns which of "classical" and "optimum" a problem has."""
    return tuple(
        name for name in ("classical", "optimum") if getattr(type(problem), name) is not getattr(Problem, name)
    )


class WithPayload(Protocol):
    """What a problem has whose sites send additive statistics, such as sums for EM, in place of a gradient."""

    def payload(self, path: list[Parameters], task: Any) -> Parameters:
        """Returns what a site sends, from its path of parameters and its task."""

    def payload_shapes(self, state: Parameters) -> dict[str, tuple[int, ...]]:
        """Returns the keys and shapes of what every site sends."""


class WithOuterStep(WithPayload, Protocol):
    """What a problem has beside, where the server's optimizer does not step along what sites send."""

    def outer_step(self, state: Parameters, total: Parameters, weight: float) -> Parameters:
        """Returns the parameters that the server makes of the weighted sum of what sites sent."""


def has_payload(problem: object) -> TypeGuard[WithPayload]:
    """Returns whether a problem's sites send statistics of their own in place of a gradient."""
    return callable(getattr(problem, "payload", None))


def has_outer_step(problem: object) -> TypeGuard[WithOuterStep]:
    """Returns whether a problem makes its own step of what its sites send."""
    return has_payload(problem) and callable(getattr(problem, "outer_step", None))
