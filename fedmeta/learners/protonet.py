"""Prototypical networks (Snell, Swersky and Zemel, NeurIPS 2017): a class is the mean of its support rows' features.

c_k = mean of f(x) over the support rows of class k (equation 1);  p(y = k | x) ~ exp(-|f(x) - c_k|^2) (equation 2)
The same as a linear head of weights 2 c_k and bias -|c_k|^2, up to |f(x)|^2, which is alike for all k (section 2.3): so
a site's head is set, and not descended to. The exact gradient of the query loss runs through the prototypes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import grad

from fedmeta.errors import FedmetaError
from fedmeta.learners.learner import DEFAULTS, MetaState
from fedmeta.learners.maml import Maml
from fedmeta.models import Parameters
from fedmeta.problems.problem import Data
from fedmeta.task import rows_mask


@dataclass(frozen=True)
class ProtoNet(Maml):
    """Sends d L_Q / d theta with the head that prototypes make (`inner_steps` and `inner_lr` are unused).

    A class without a support row keeps theta's row of the head, so that theta's head serves sites that lack classes.

    Attributes:
        head: The linear layer that the model ends in, by its name; empty for the last with parameters.
    """

    head: str = DEFAULTS.head

    classes_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        layer = self.problem.layer(self.head)[0].rpartition(".")[0]
        module = self.network.module.get_submodule(layer)
        if not isinstance(module, nn.Linear) or module.bias is None:
            raise FedmetaError(
                f"[learner] head: protonet sets a linear head with a bias, and the model's layer "
                f'"{layer}" is {type(module).__name__}: end the model in nn.Linear, or take anil'
            )

    @property
    def head_names(self) -> tuple[str, str]:
        """The head's weight [classes, features] and bias [classes]."""
        layer = self.problem.layer(self.head)[0].rpartition(".")[0]
        prefix = f"{layer}." if layer else ""
        return f"{prefix}weight", f"{prefix}bias"

    def evaluation_steps(self, steps: int | None = None) -> int:
        """Returns `steps`, or 1: after it a head is what it stays."""
        return 1 if steps is None else steps

    def adaptation_path(
        self, meta_state: MetaState, support: Data, steps: int, personal: Parameters | None = None
    ) -> list[Parameters]:
        """Returns theta, and theta with the head of support's prototypes for every later step."""
        theta = self.theta(meta_state)
        own = {**theta, **self.prototype_head(theta, support)} if steps else theta
        return [theta, *[own] * steps]

    def prototype_head(self, theta: Parameters, support: Data) -> Parameters:
        """Returns the head's weight 2 c_k and bias -|c_k|^2 for the classes that have support rows, else theta's.

        The logit of class k is linear in row k of the head's weight, with the features as its slope: the slope of each
        row's own logit, summed, is the sum of each class's features.

        Raises:
            FedmetaError: Targets are numbers.
        """
        x, y = support[0], support[1]
        if y.is_floating_point():
            raise FedmetaError("learner protonet needs classes, and the targets are numbers: take anil or maml")
        weight_name, bias_name = self.head_names
        weight, bias = theta[weight_name], theta[bias_name]
        member: Tensor = y[:, None] == torch.arange(len(bias), device=y.device)
        member = member * rows_mask(support).to(weight.dtype)[:, None]

        def own_logits(head: Tensor) -> Tensor:
            logits: Tensor = self.predict({**theta, weight_name: head}, x)
            return (logits * member).sum()

        count = member.sum(0)
        prototypes = grad(own_logits)(weight) / count.clamp(min=1)[:, None]
        return {
            weight_name: torch.where(count[:, None] > 0, 2 * prototypes, weight),
            bias_name: torch.where(count > 0, -prototypes.square().sum(1), bias),
        }
