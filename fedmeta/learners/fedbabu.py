"""FedBABU, "body and body update" (Oh, Kim and Yun, ICLR 2022): the body is trained under a head that never moves.

theta_i = E epochs of the body alone on the site's rows, under the start's random head (algorithm 1)
phi_i = K steps of the head on support, under the body that was learned (section 5)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedmeta.learners.fedavg import FedAvgFinetuned
from fedmeta.learners.learner import DEFAULTS, MetaState
from fedmeta.learners.local_steps import descend
from fedmeta.models import Parameters
from fedmeta.task import Task


@dataclass(frozen=True)
class FedBabu(FedAvgFinetuned):
    """Sends the displacement of the body; a site tunes the head, which is the start's until then.

    Attributes:
        head: The layer that is fixed in training and tuned by a site, by its name; empty for the last with parameters.
    """

    head: str = DEFAULTS.head

    def __post_init__(self) -> None:
        super().__post_init__()
        self.problem.layer(self.head)

    def rates(self, meta_state: MetaState, step: int) -> Mapping[str, Tensor | float]:
        """Returns inner_lr for the head's parameters: what a site tunes."""
        return dict.fromkeys(self.problem.layer(self.head), self.inner_lr)

    def local_model(self, meta_state: MetaState, task: Task) -> Parameters:
        """Returns theta_i, what E epochs make of the body."""
        body = [name for name in self.problem.trained if name not in self.problem.layer(self.head)]
        return descend(self, self.theta(meta_state), task, dict.fromkeys(body, self.inner_lr))
