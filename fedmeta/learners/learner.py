"""What every learner shares: the meta-state, the inner loop, and the interface that clients and engines call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor

from fedmeta import experiment
from fedmeta.errors import FedmetaError
from fedmeta.learners.gradient_kind import estimator
from fedmeta.minibatches import Minibatches
from fedmeta.models import FunctionalModel, Parameters
from fedmeta.noise import in_objective
from fedmeta.problems.problem import Data, Problem, has_payload
from fedmeta.problems.solvers import BLACK_BOX, DIFFERENTIABLE, run_solver
from fedmeta.problems.supervised import Supervised
from fedmeta.task import Task

MetaState = Mapping[str, Tensor]
"""What travels from server to sites: "theta.NAME" for each parameter that inner loops move, a shared one under its own
name, "alpha.NAME" for learned rates, and "frozen.NAME" for what is never trained."""

Metrics = dict[str, Tensor]
"""Per-site figures of one round; each a scalar."""

THETA = "theta."
ALPHA = "alpha."
FROZEN = "frozen."

DEFAULTS = experiment.Learner()
"""The section [learner]: where the default, the range and the help of each learner's keys stand."""

SET_BY_ROUND = "by_round"
"""Marks (in a field's metadata) what `Learner.for_round` sets, so that it is no key of an experiment."""


@dataclass(frozen=True)
class Learner(ABC):
    """A federated (meta-)learner: pure functions on dictionaries of tensors.

    Attributes:
        problem: What sites solve; a torch module, or a function that makes one, stands for supervised learning.
        inner_steps: K, the number of inner steps.
        inner_lr: The inner learning rate.
    """

    problem: Problem
    inner_steps: int = DEFAULTS.inner_steps
    inner_lr: float = DEFAULTS.inner_lr

    update: ClassVar[str] = "gradient"
    """What a site sends: a "gradient" of its outer objective, a "delta" theta - theta_i, or "nothing"."""

    adapts: ClassVar[bool] = True
    """Whether a site's own parameters differ from the global ones."""

    averaged: ClassVar[str] = ""
    """The prefix of those keys of the meta-state that are means over all training sites: a round's sites change them by
    their share of all, and no optimizer steps them; empty for none."""

    classes_only: ClassVar[bool] = False
    """Whether it needs labels that are classes, and takes no targets that are numbers."""

    differentiates: ClassVar[str] = "the inner steps"
    """What of the solver it differentiates: "the inner steps", "the solution" where they are solved, or "" for none."""

    def __post_init__(self) -> None:
        if not isinstance(self.problem, Problem):
            object.__setattr__(self, "problem", Supervised(self.problem))
        _check_overrides(type(self))
        _check_settings(self)
        if self.inner_steps < 0:
            raise FedmetaError(f"learner.inner_steps = {self.inner_steps}: it must be at least 0")
        if not self.inner_lr > 0:
            raise FedmetaError(f"learner.inner_lr = {self.inner_lr}: it must be greater than 0")
        kind, solver = self.problem.solver.kind, type(self.problem.solver).__name__
        if kind == BLACK_BOX and self.differentiates and not has_payload(self.problem):
            raise FedmetaError(
                f"learner {type(self).__name__} differentiates through {self.differentiates}, and the solver {solver} "
                "is a black box without derivatives: take one that sends a delta, such as fedavg-ft or reptile, or "
                "give the problem a payload"
            )
        if kind != DIFFERENTIABLE and self.differentiates == "by proximal steps":
            raise FedmetaError(
                f"learner {type(self).__name__} descends a proximal objective step by step, and the solver {solver} is "
                f"{kind}: take maml, or a learner that sends a delta"
            )

    @property
    def network(self) -> FunctionalModel:
        """The model of supervised learning as a function of parameters and inputs.

        Raises:
            FedmetaError: The problem has no model on rows.
        """
        if not isinstance(self.problem, Supervised):
            raise FedmetaError(f"problem {type(self.problem).__name__} has no model on rows")
        return self.problem.network

    @property
    def minibatches(self) -> Minibatches | None:
        """How a site goes through all its train rows in a round; None where it adapts on support for query."""
        return None

    @property
    def estimator(self) -> str:
        """What `meta_gradient` computes: "exact", "first-order", "delta", "nothing" or "custom"."""
        return estimator(type(self), Learner)

    def init(self, seed: int) -> dict[str, Tensor]:
        """Returns the initial meta-state, drawn from `seed` alone."""
        problem = self.problem
        assert problem.layout, "what init returns is checked before it is used"
        prefix = {**dict.fromkeys(problem.shared, ""), **dict.fromkeys(problem.frozen, FROZEN)}
        return {prefix.get(name, THETA) + name: value.detach() for name, value in problem.init(seed).items()}

    def theta(self, meta_state: MetaState) -> Parameters:
        """Returns all initial parameters under the problem's own names, shared and frozen ones included."""
        return {name: meta_state[key_of(meta_state, name)] for name in self.problem.names}

    def rates(self, meta_state: MetaState, step: int) -> Mapping[str, Tensor | float]:
        """Returns the rate of inner step `step` (from 0) for each parameter that adapts; the others stay at theta."""
        return dict.fromkeys(self.problem.moved, self.inner_lr)

    def predict(self, parameters: Parameters, x: Tensor) -> Tensor:
        """Returns outputs [n, outputs] (logits, or predictions for regression) for inputs [n, *shape]."""
        assert isinstance(self.problem, Supervised)
        return self.problem.predict(parameters, x)

    def inner(self, parameters: Parameters, data: Data) -> Tensor:
        """Returns the problem's inner objective of constrained parameters."""
        with in_objective("inner"):
            return self.problem.inner(self.problem.constrain(parameters), data)

    def outer(self, parameters: Parameters, data: Data) -> Tensor:
        """Returns the problem's outer objective of constrained parameters."""
        with in_objective("outer"):
            return self.problem.outer(self.problem.constrain(parameters), data)

    def all_data(self, parameters: Parameters, task: Task) -> Tensor:
        """Returns the problem's objective on all of a task's data, of constrained parameters."""
        with in_objective("all_data"):
            return self.problem.all_data(self.problem.constrain(parameters), *task)

    def evaluate(self, parameters: Parameters, data: Data) -> dict[str, Tensor]:
        """Returns "loss", the outer objective, and every metric of constrained parameters, each a scalar."""
        own = self.problem.constrain(parameters)
        found = self.problem.evaluate(own, data)
        return found if "loss" in found else {"loss": self.problem.outer(own, data), **found}

    def solve(
        self, start: Parameters, data: Data, meta_state: MetaState, steps: int, lr: Mapping[str, float] | None = None
    ) -> list[Parameters]:
        """Returns the path of the problem's solver on a site's data, with this learner's rates or with `lr`."""
        rates = partial(self.rates, meta_state) if lr is None else lambda step: lr
        return run_solver(self.problem, self.inner, start, data, rates, steps)

    def adaptation_path(
        self, meta_state: MetaState, support: Data, steps: int, personal: Parameters | None = None
    ) -> list[Parameters]:
        """Returns the site's parameters after 0, 1, ... `steps` inner steps on its support data.

        The first are theta, the global model; the last are differentiable with respect to the meta-state.

        Args:
            meta_state: The meta-state.
            support: What the site adapts on: (x, y) or (x, y, mask), or an own problem's data.
            steps: The number of inner steps.
            personal: The personal part that the site kept (see `personal`), from which its steps resume; None for a
                site that kept none, as every new site.
        """
        return self.solve(self.theta(meta_state), support, meta_state, steps)

    def adapt(
        self, meta_state: MetaState, support: Data, steps: int | None = None, personal: Parameters | None = None
    ) -> Parameters:
        """Returns the site's own parameters: U(theta), the inner loop on its support data.

        Args:
            meta_state: The meta-state.
            support: As for `adaptation_path`.
            steps: The number of inner steps; None for `inner_steps`. A learner that does not adapt takes none.
            personal: As for `adaptation_path`.
        """
        return self.adaptation_path(meta_state, support, self.evaluation_steps(steps), personal)[-1]

    def evaluation_steps(self, steps: int | None = None) -> int:
        """Returns a site's inner steps at evaluation: `steps` (None: `inner_steps`), or 0 if it never adapts."""
        if not self.adapts:
            return 0
        return self.inner_steps if steps is None else steps

    def query_weights(self, meta_state: MetaState) -> Sequence[Tensor | float]:
        """Returns v: how much the query loss after 0, 1, ... K inner steps counts in the meta-objective."""
        return [0.0] * self.inner_steps + [1.0]

    @abstractmethod
    def meta_gradient(self, meta_state: MetaState, task: Task) -> tuple[dict[str, Tensor], Metrics]:
        """Returns what a site sends (the keys of the trained part of the meta-state) and its figures ("query_loss")."""

    def message(self, meta_state: MetaState, task: Task) -> tuple[dict[str, Tensor], Metrics]:
        """Returns what a site sends: the problem's own statistics where it has a payload, else `meta_gradient`."""
        if not has_payload(self.problem):
            return self.meta_gradient(meta_state, task)
        path = self.adaptation_path(meta_state, task.support, self.inner_steps)
        sent = self.problem.payload(path, task)
        return sent, {"query_loss": self.outer(path[-1], task.query)}

    def message_template(self, meta_state: MetaState) -> dict[str, Tensor]:
        """Returns tensors with the keys and shapes of what a site sends."""
        if not has_payload(self.problem):
            return trained(meta_state)
        shapes = self.problem.payload_shapes(self.theta(meta_state))
        like = next(iter(trained(meta_state).values()))
        return {name: like.new_zeros(tuple(shape)) for name, shape in shapes.items()}

    def for_round(self, round_number: int, rounds: int) -> Learner:
        """Returns the learner as it is in one round (from 1) of a run of `rounds`; most are the same in all."""
        return self

    def personal(self, meta_state: MetaState) -> Parameters:
        """Returns the personal part that a site starts with, under the problem's own names: what stays at the site.

        Empty for a learner that keeps nothing between rounds, as most do.
        """
        return {}

    def train(
        self, meta_state: MetaState, task: Task, personal: Parameters
    ) -> tuple[dict[str, Tensor], Metrics, Parameters]:
        """Returns what a site sends, its figures, and the personal part that it keeps for its next round.

        Args:
            meta_state: The meta-state.
            task: The site's task.
            personal: What the site kept from its last round; `personal(meta_state)` at its first.
        """
        gradient, metrics = self.meta_gradient(meta_state, task)
        return gradient, metrics, personal


def check_counts(learner: Learner, **least: int) -> None:
    """Raises `FedmetaError` where one of a learner's keys is below the least that it may be."""
    for key, smallest in least.items():
        value = getattr(learner, key)
        if value < smallest:
            raise FedmetaError(f"learner.{key} = {value}: it must be at least {smallest}")


UNUSED = {
    "predict": "the outputs that are trained on are the model's: change them in the model",
    "loss": "the objective is the problem's: override inner (and outer) in a subclass of fedmeta.problems.Supervised",
    "score": "scores are the problem's metrics: name yours in evaluation.metrics",
    "trajectory": "the inner loop is called adaptation_path",
}
"""Methods that a learner of one's own may well define and that training would pass over; and where they belong."""


def _check_overrides(kind: type[Learner]) -> None:
    """Raises `FedmetaError` where a learner's class defines what training would pass over without a word."""
    for name, hint in UNUSED.items():
        if getattr(kind, name, None) is not getattr(Learner, name, None):
            raise FedmetaError(f"learner {kind.__name__} defines {name}, which training does not call: {hint}")


def _check_settings(learner: Learner) -> None:
    """Checks that each key of a learner has a value of its default's type, and that numbers are finite.

    Raises:
        FedmetaError: One has not; names it.
    """
    for each in fields(learner):
        value, usual = getattr(learner, each.name), each.default
        if isinstance(usual, bool) or not isinstance(usual, int | float | str):
            continue
        what = {int: "a whole number", float: "a finite number", str: "a text"}[type(usual)]
        if isinstance(usual, str):
            fits = isinstance(value, str)
        elif isinstance(usual, int):
            fits = isinstance(value, int) and not isinstance(value, bool)
        else:
            fits = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
        if not fits:
            raise FedmetaError(f"learner.{each.name} = {value!r}: it must be {what}")


def key_of(meta_state: MetaState, name: str) -> str:
    """Returns the meta-state's key of a parameter."""
    return next((prefix + name for prefix in (THETA, FROZEN) if prefix + name in meta_state), name)


def trained(meta_state: MetaState) -> dict[str, Tensor]:
    """Returns the trained part of a meta-state: all but what is frozen."""
    return {name: value for name, value in meta_state.items() if not name.startswith(FROZEN)}


def frozen(meta_state: MetaState) -> dict[str, Tensor]:
    """Returns the part of a meta-state that is never trained."""
    return {name: value for name, value in meta_state.items() if name.startswith(FROZEN)}


def zeros_like(meta_state: MetaState) -> dict[str, Tensor]:
    """Returns a gradient of zeros with the keys of the trained part of a meta-state."""
    return {name: torch.zeros_like(value) for name, value in trained(meta_state).items()}


def with_theta(meta_state: MetaState, values: Parameters) -> dict[str, Tensor]:
    """Returns a gradient with these values for parameters, by their own names, and zeros for what else is trained."""
    own = {key_of(meta_state, name): value for name, value in values.items()}
    return {name: own[name] if name in own else torch.zeros_like(value) for name, value in trained(meta_state).items()}


def by(
    objective: Callable[[Parameters], Tensor], parameters: Parameters, names: Sequence[str]
) -> tuple[Callable[[Parameters], Tensor], Parameters]:
    """Returns an objective as a function of the named parameters alone, and these."""
    fixed = {name: value for name, value in parameters.items() if name not in names}
    return lambda moving: objective({**fixed, **moving}), {name: parameters[name] for name in names}
