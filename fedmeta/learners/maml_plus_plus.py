"""MAML++ (Antoniou, Edwards and Storkey, ICLR 2019): rates per layer and step, and a query loss at every step.

phi_k = phi_(k-1) - alpha[layer, k] * d L_S / d phi;   sends d (sum over k of w_k L_Q(phi_k)) / d (theta, alpha)

Of the paper's six changes these are the two that concern the inner loop in a federation (sections 4.1 and 4.4):
its batch statistics per step would leak test rows, its first-order beginning would not be exact, and the annealing of
the outer rate is the server's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedmeta.errors import FedmetaError
from fedmeta.learners.learner import ALPHA, DEFAULTS, SET_BY_ROUND, THETA, Learner, MetaState
from fedmeta.learners.maml import Maml


@dataclass(frozen=True)
class MamlPlusPlus(Maml):
    """MAML with learned rates per layer and step, trained on the query loss after every step.

    Attributes:
        annealing: The share of a run's rounds in which the weight moves from all steps alike to the last step.
        step_weights: The weight of the query loss after each of the K steps. `for_round` sets it by the round; empty
        for
            the annealing's end, which is all on the last step.
    """

    annealing: float = DEFAULTS.annealing
    step_weights: tuple[float, ...] = field(default=(), metadata={SET_BY_ROUND: True})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inner_steps < 1:
            raise FedmetaError(f"learner.inner_steps = {self.inner_steps}: maml++ needs at least 1")
        if len(self.step_weights) not in (0, self.inner_steps):
            raise FedmetaError(
                f"step_weights has {len(self.step_weights)} weights for {self.inner_steps} inner steps: give one each"
            )

    def init(self, seed: int) -> dict[str, Tensor]:
        """Returns "theta.NAME", and "alpha.LAYER" [K] at `inner_lr`; a parameter of no layer has its own alpha."""
        theta = super().init(seed)
        like = theta[THETA + self.problem.moved[0]]
        layers = dict.fromkeys(map(layer_of, self.problem.moved))
        return {**theta, **{ALPHA + layer: like.new_full((self.inner_steps,), self.inner_lr) for layer in layers}}

    def rates(self, meta_state: MetaState, step: int) -> Mapping[str, Tensor | float]:
        """Returns each layer's rate in this step; in steps beyond those that were learned, that of the last."""
        alphas = {layer: meta_state[ALPHA + layer] for layer in map(layer_of, self.problem.moved)}
        own = {layer: alpha[min(step, len(alpha) - 1)] for layer, alpha in alphas.items()}
        return {name: own[layer_of(name)] for name in self.problem.moved}

    def query_weights(self, meta_state: MetaState) -> Sequence[Tensor | float]:
        """Returns the weight of the query loss after each step (equation 2), beside `global_weight` for theta's own."""
        weights = self.step_weights or (*[0.0] * (self.inner_steps - 1), 1.0)
        return [self.global_weight, *((1 - self.global_weight) * weight for weight in weights)]

    def for_round(self, round_number: int, rounds: int) -> Learner:
        """Returns the learner with a round's step weights: 1 / K each in round 1, and by equal steps to the last."""
        end = self.annealing * rounds
        progress = min(1.0, (round_number - 1) / end) if end > 0 else 1.0
        each = (1 - progress) / self.inner_steps
        weights = (*[each] * (self.inner_steps - 1), 1 - each * (self.inner_steps - 1))
        return replace(self, step_weights=weights)


def layer_of(name: str) -> str:
    """Returns the layer that a parameter belongs to; a parameter of the model itself is its own layer."""
    return name.rpartition(".")[0] or name
