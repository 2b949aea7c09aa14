"""MAML (Finn, Abbeel and Levine, ICML 2017) between sites (FedMeta: Chen et al. 2018), exact and first-order.

phi = U(theta): K steps of phi <- phi - inner_lr * d L_S(phi) / d phi, from theta
maml:   d L_Q(U(theta)) / d theta, through every step
fomaml: d L_Q(phi) / d phi, at phi = U(theta)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.func import grad_and_value

from fedmeta.learners.gradient_kind import gradient_kind
from fedmeta.learners.learner import DEFAULTS, Learner, MetaState, Metrics, by, frozen, trained, with_theta
from fedmeta.models import Parameters
from fedmeta.task import Task


@dataclass(frozen=True)
class Maml(Learner):
    """Sends the exact meta-gradient d L_Q(U(theta)) / d theta (Finn et al. 2017, equation 1).

    Attributes:
        global_weight: w in [0, 1]: the objective is (1 - w) L_Q(U(theta)) + w L_Q(theta), so that theta also serves a
            site that has no labels yet.
    """

    global_weight: float = DEFAULTS.global_weight

    def query_weights(self, meta_state: MetaState) -> Sequence[Tensor | float]:
        """Returns w for the unadapted query loss, 1 - w for the one after K steps, and 0 between."""
        between = [0.0] * (self.inner_steps - 1)
        return [self.global_weight, *between, 1 - self.global_weight] if self.inner_steps else [1.0]

    @gradient_kind("exact")
    def meta_gradient(self, meta_state: MetaState, task: Task) -> tuple[dict[str, Tensor], Metrics]:
        """Returns the gradient of the query loss after adaptation, through all inner steps, and that loss."""

        def objective(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            whole = {**state, **constant}
            path = self.adaptation_path(whole, task.support, self.inner_steps)
            query_loss = self.outer(path[-1], task.query)
            *weights, last = self.query_weights(whole)
            terms = [weight * self.outer(path[step], task.query) for step, weight in nonzero_weights(weights)]
            return sum(terms, last * query_loss), query_loss

        constant = frozen(meta_state)
        gradient, (_, query_loss) = grad_and_value(objective, has_aux=True)(trained(meta_state))
        return gradient, {"query_loss": query_loss}


@dataclass(frozen=True)
class Fomaml(Maml):
    """Sends d L_Q / d phi at the adapted parameters (Finn et al. 2017, section 5.2: the first-order approximation)."""

    differentiates: ClassVar[str] = ""

    @gradient_kind("first-order")
    def meta_gradient(self, meta_state: MetaState, task: Task) -> tuple[dict[str, Tensor], Metrics]:
        """Returns the gradient of the query loss at the adapted parameters, and that loss."""
        path = self.adaptation_path(meta_state, task.support, self.inner_steps)
        *weights, last = self.query_weights(meta_state)
        own, query_loss = self._outer_gradient(path[-1], task)
        gradient = {name: last * value for name, value in own.items()}
        for step, weight in nonzero_weights(weights):
            own, _ = self._outer_gradient(path[step], task)
            gradient = {name: value + weight * own[name] for name, value in gradient.items()}
        return with_theta(meta_state, gradient), {"query_loss": query_loss}

    def _outer_gradient(self, parameters: Parameters, task: Task) -> tuple[Parameters, Tensor]:
        return grad_and_value(by(lambda own: self.outer(own, task.query), parameters, self.problem.trained)[0])(
            {name: parameters[name] for name in self.problem.trained}
        )


def nonzero_weights(weights: Sequence[Tensor | float]) -> list[tuple[int, Tensor | float]]:
    """Returns the (step, weight) of those steps whose weight is not plainly zero."""
    return [(step, weight) for step, weight in enumerate(weights) if isinstance(weight, Tensor) or weight != 0]
