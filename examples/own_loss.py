"""A loss of one's own on ordinary rows: rare classes count more, and what is learned is scored as ever."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedmeta import rows_mask
from fedmeta.problems import Parameters, Supervised


class Weighted(Supervised):
    """Cross-entropy in which class c counts `growth ** c` times."""

    def __init__(self, model: Any, growth: float = 1.2, **settings: Any) -> None:
        super().__init__(model, **settings)
        self.growth = growth

    def inner(self, parameters: Parameters, data: tuple[Tensor, ...]) -> Tensor:
        outputs, y = self.predict(parameters, data[0]), data[1]
        weights = rows_mask(data) * torch.pow(self.growth, y.to(outputs.dtype))
        return (weights * cross_entropy(outputs, y, reduction="none")).sum() / weights.sum()
