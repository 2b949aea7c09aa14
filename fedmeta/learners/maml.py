"""MAML (Finn, Abbeel and Levine, ICML 2017) between sites (FedMeta: Chen et al. 2018), exact and first-order.

phi = U(theta): K steps of phi <- phi - inner_lr * d L_S(phi) / d phi, from theta
maml:   d L_Q(U(theta)) / d theta, through every step
fomaml: d L_Q(phi) / d phi, at phi = U(theta)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.func import grad_and_value

from fedmeta.learners.learner import Learner, MetaState, Metrics, with_theta
from fedmeta.task import Task


@dataclass(frozen=True)
class Maml(Learner):
    """Sends the exact meta-gradient d L_Q(U(theta)) / d theta (Finn et al. 2017, equation 1).

    Attributes:
        global_weight: w in [0, 1]: the objective is (1 - w) L_Q(U(theta)) + w L_Q(theta), so that theta also serves a
            site that has no labels yet.
    """

    global_weight: float = 0.0

    def meta_gradient(self, meta_state: MetaState, task: Task) -> tuple[dict[str, Tensor], Metrics]:
        """Returns the gradient of the query loss after adaptation, through all inner steps, and that loss."""

        def objective(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            adapted = self.loss(self.trajectory(state, task.support, self.inner_steps)[-1], task.query)
            if not self.global_weight:
                return adapted, adapted
            unadapted = self.loss(self.theta(state), task.query)
            return (1 - self.global_weight) * adapted + self.global_weight * unadapted, adapted

        gradient, (_, query_loss) = grad_and_value(objective, has_aux=True)(dict(meta_state))
        return gradient, {"query_loss": query_loss}


@dataclass(frozen=True)
class Fomaml(Maml):
    """Sends d L_Q / d phi at the adapted parameters (Finn et al. 2017, section 5.2: the first-order approximation)."""

    def meta_gradient(self, meta_state: MetaState, task: Task) -> tuple[dict[str, Tensor], Metrics]:
        """Returns the gradient of the query loss at the adapted parameters, and that loss."""
        adapted = self.trajectory(meta_state, task.support, self.inner_steps)[-1]
        gradient, query_loss = grad_and_value(self.loss)(adapted, task.query)
        if self.global_weight:
            unadapted, _ = grad_and_value(self.loss)(self.theta(meta_state), task.query)
            w = self.global_weight
            gradient = {name: (1 - w) * value + w * unadapted[name] for name, value in gradient.items()}
        return with_theta(meta_state, gradient), {"query_loss": query_loss}
