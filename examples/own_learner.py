"""Custom learners: subclasses that define only what differs."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedmeta import Task
from fedmeta.learners import MetaState, Metrics
from fedmeta.learners.maml import Fomaml, Maml


@dataclass(frozen=True)
class DecayingMaml(Maml):
    """MAML whose inner rate falls from step to step; its meta-gradient is exact through that, too.

    Attributes:
        decay: What the rate is multiplied by after each step, a key of [learner].
    """

    decay: float = 0.7

    def rates(self, meta_state: MetaState, step: int) -> Mapping[str, Tensor | float]:
        return dict.fromkeys(self.problem.moved, self.inner_lr * self.decay**step)


@dataclass(frozen=True)
class SignMaml(Fomaml):
    """Sends one bit of each entry of first-order MAML's gradient."""

    def meta_gradient(self, meta_state: MetaState, task: Task) -> tuple[dict[str, Tensor], Metrics]:
        gradient, metrics = super().meta_gradient(meta_state, task)
        return {name: value.sign() for name, value in gradient.items()}, metrics
