"""ANIL, "almost no inner loop" (Raghu et al., ICLR 2020): the body is meta-learned, the head adapts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedmeta.learners.learner import DEFAULTS, MetaState
from fedmeta.learners.maml import Maml


@dataclass(frozen=True)
class Anil(Maml):
    """MAML whose inner loop moves the head alone (section 4.1); sends the exact gradient of all parameters.

    Attributes:
        head: The layer that adapts, by its name in the module; empty for the last one with parameters.
    """

    head: str = DEFAULTS.head

    def __post_init__(self) -> None:
        super().__post_init__()
        self.problem.layer(self.head)

    def rates(self, meta_state: MetaState, step: int) -> Mapping[str, Tensor | float]:
        """Returns inner_lr for the head's parameters."""
        return dict.fromkeys(self.problem.layer(self.head), self.inner_lr)
