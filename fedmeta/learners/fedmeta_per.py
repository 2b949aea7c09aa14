"""FedMeta-Per (Nguyen, Cao and Le 2022): meta-learned shared layers under personal layers that stay at the site.

phi_i = U([body, h_i]): K steps of all layers on support, from the shared body and the site's own head
body: the server steps along d L_Q(phi_i) / d body, exact;  h_i <- h_i - local_lr * d L_Q(phi_i) / d h_i, at the site
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedmeta.learners.learner import DEFAULTS, MetaState, Metrics, key_of
from fedmeta.learners.maml import Maml
from fedmeta.models import Parameters
from fedmeta.problems.problem import Data
from fedmeta.task import Task


@dataclass(frozen=True)
class FedMetaPer(Maml):
    """Sends the exact meta-gradient of the body; the head takes its own meta-step, and stays.

    Attributes:
        head: The layer that stays at the site, by its name; empty for the last one with parameters.
        local_lr: The rate of the head's meta-step in a round.
    """

    head: str = DEFAULTS.head
    local_lr: float = DEFAULTS.local_lr

    def __post_init__(self) -> None:
        super().__post_init__()
        self.problem.layer(self.head)

    def personal(self, meta_state: MetaState) -> Parameters:
        """Returns theta's head."""
        theta = self.theta(meta_state)
        return {name: theta[name] for name in self.problem.layer(self.head)}

    def adaptation_path(
        self, meta_state: MetaState, support: Data, steps: int, personal: Parameters | None = None
    ) -> list[Parameters]:
        """Returns theta, and after it the site's parameters after 1, ... `steps` steps from the body and its head."""
        theta = self.theta(meta_state)
        return [theta, *self.solve({**theta, **(personal or {})}, support, meta_state, steps)[1:]]

    def train(
        self, meta_state: MetaState, task: Task, personal: Parameters
    ) -> tuple[dict[str, Tensor], Metrics, Parameters]:
        """Returns the body's meta-gradient (zeros for the head), the query loss, and the head after its own step."""
        own = {key_of(meta_state, name): value for name, value in personal.items()}
        # From its own head: theta with the head in place is the start of this site.
        gradient, metrics = super().meta_gradient({**meta_state, **own}, task)
        head = {name: value - self.local_lr * gradient[key_of(meta_state, name)] for name, value in personal.items()}
        sent = gradient | {name: torch.zeros_like(value) for name, value in own.items()}
        return sent, metrics, head

    def meta_gradient(self, meta_state: MetaState, task: Task) -> tuple[dict[str, Tensor], Metrics]:
        """Returns what a site sends in its first round."""
        gradient, metrics, _ = self.train(meta_state, task, self.personal(meta_state))
        return gradient, metrics
