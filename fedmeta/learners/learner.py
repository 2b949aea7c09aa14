"""What every learner shares: the meta-state, the inner loop, and the interface that clients and engines call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedmeta.errors import FedmetaError
from fedmeta.learners.gradient_kind import estimator
from fedmeta.learners.inner import inner_loop
from fedmeta.models import FunctionalModel, Parameters
from fedmeta.problems.rows import calibration_error, loss, score
from fedmeta.task import Rows, Task, rows_mask

MetaState = Mapping[str, Tensor]
"""What travels from server to sites: "theta.NAME" for each parameter, "alpha.NAME" for learned rates, and the like."""

Metrics = dict[str, Tensor]
"""Per-site figures of one round; each a scalar."""

THETA = "theta."
ALPHA = "alpha."

SET_BY_ROUND = "by_round"
"""Marks (in a field's metadata) what `Learner.at` sets, so that it is no key of an experiment."""


@dataclass(frozen=True)
class Learner(ABC):
    """A federated (meta-)learner: pure functions on dictionaries of tensors.

    Attributes:
        model: The module, or a function that makes it.
        inner_steps: K, the number of inner steps.
        inner_lr: The inner learning rate.
    """

    model: nn.Module | Callable[[], nn.Module] | FunctionalModel
    inner_steps: int = 5
    inner_lr: float = 0.1

    sends: ClassVar[str] = "gradient"
    """What a site sends: a "gradient" of its query loss, its own "displacement" theta - theta_i, or "nothing"."""

    adapts: ClassVar[bool] = True
    """Whether a site's own model differs from the global one."""

    def __post_init__(self) -> None:
        if not isinstance(self.model, FunctionalModel):
            object.__setattr__(self, "model", FunctionalModel(self.model))
        if self.inner_steps < 0:
            raise FedmetaError(f"learner.inner_steps = {self.inner_steps}: it must be at least 0")

    @property
    def network(self) -> FunctionalModel:
        """The model as a function of parameters and inputs."""
        assert isinstance(self.model, FunctionalModel)
        return self.model

    @property
    def estimator(self) -> str:
        """What `meta_gradient` computes: "exact", "first-order", "displacement", "nothing" or "custom"."""
        return estimator(type(self), Learner)

    def init(self, seed: int) -> dict[str, Tensor]:
        """Returns the initial meta-state, drawn from `seed` alone."""
        return {THETA + name: value for name, value in self.network.init(seed).items()}

    def theta(self, meta_state: MetaState) -> Parameters:
        """Returns the initial parameters theta under the module's own names."""
        return {name: meta_state[THETA + name] for name in self.network.names}

    def rates(self, meta_state: MetaState, step: int) -> Mapping[str, Tensor | float]:
        """Returns the rate of inner step `step` (from 0) for each parameter that adapts; the others stay at theta."""
        return dict.fromkeys(self.network.names, self.inner_lr)

    def predict(self, parameters: Parameters, x: Tensor) -> Tensor:
        """Returns outputs [n, outputs] (logits, or predictions for regression) for inputs [n, *shape]."""
        return self.network(parameters, x)

    def loss(self, parameters: Parameters, rows: Rows) -> Tensor:
        """Returns the mean loss of a model on rows: cross-entropy, or mean squared error for floating-point y."""
        return loss(self.predict(parameters, rows[0]), rows[1], rows_mask(rows))

    def score(self, parameters: Parameters, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (accuracy or RMSE, loss, calibration error) of a model; a row of an unseen class scores as wrong."""
        outputs, y, mask = self.predict(parameters, rows[0]), rows[1], rows_mask(rows)
        return score(outputs, y, mask), loss(outputs, y, mask), calibration_error(outputs, y, mask)

    def adaptation_path(
        self, meta_state: MetaState, support: Rows, steps: int, personal: Parameters | None = None
    ) -> list[Parameters]:
        """Returns the site's parameters after 0, 1, ... `steps` inner steps on its support rows.

        The first are theta, the global model; the last are differentiable with respect to the meta-state.

        Args:
            meta_state: The meta-state.
            support: (x, y) or (x, y, mask).
            steps: The number of inner steps.
            personal: The personal part that the site kept (see `personal`), from which its steps go on; None for a
                site that kept none, as every new site.
        """
        theta = self.theta(meta_state)
        return inner_loop(partial(self.loss, rows=support), theta, partial(self.rates, meta_state), steps)

    def adapt(
        self, meta_state: MetaState, support: Rows, steps: int | None = None, personal: Parameters | None = None
    ) -> Parameters:
        """Returns the site's own parameters: U(theta), the inner loop on its support rows.

        Args:
            meta_state: The meta-state.
            support: (x, y) or (x, y, mask).
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
        """Returns what a site sends (the meta-state's keys) and its figures ("query_loss")."""

    def at(self, round_number: int, rounds: int) -> Learner:
        """Returns the learner as it is in one round (from 1) of a run of `rounds`; most are the same in all."""
        return self

    def personal(self, meta_state: MetaState) -> Parameters:
        """Returns the personal part that a site starts with, under the module's own names: what stays at the site.

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


def zeros_like(meta_state: MetaState) -> dict[str, Tensor]:
    """Returns a gradient of zeros with the meta-state's keys."""
    return {name: torch.zeros_like(value) for name, value in meta_state.items()}


def with_theta(meta_state: MetaState, theta: Parameters) -> dict[str, Tensor]:
    """Returns a gradient with these values for theta and zeros for the meta-state's other keys."""
    own = {THETA + name: value for name, value in theta.items()}
    return {name: own[name] if name in own else torch.zeros_like(value) for name, value in meta_state.items()}
