"""Meta-SGD (Li et al. 2017; federated: Chen et al. 2018): the inner rates are learned with theta.

phi <- phi - alpha * d L_S(phi) / d phi, elementwise; sends d L_Q(phi) / d (theta, alpha)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmeta.learners.learner import ALPHA, MetaState
from fedmeta.learners.maml import Maml


@dataclass(frozen=True)
class MetaSgd(Maml):
    """MAML with one learned rate per scalar parameter, free in sign; each starts at `inner_lr`."""

    def init(self, seed: int) -> dict[str, Tensor]:
        """Returns "theta.NAME", and "alpha.NAME" of the same shape."""
        theta = super().init(seed)
        rates = {
            ALPHA + name: torch.full_like(value, self.inner_lr)
            for name, value in self.theta(theta).items()
            if name in self.problem.moved
        }
        return {**theta, **rates}

    def rates(self, meta_state: MetaState, step: int) -> Mapping[str, Tensor | float]:
        """Returns alpha, the same in every step."""
        return {name: meta_state[ALPHA + name] for name in self.problem.moved}
