"""The rows of a cohort as one long batch, and losses and scores per site."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedmeta.learners.loss import row_losses
from fedmeta.task import Rows


@dataclass
class CohortRows:
    """The rows of all sites, one after the other.

    Attributes:
        x: [sites * n, *shape].
        y: [sites * n] or [sites * n, targets].
        mask: [sites, n].
        kept: What does not change between inner steps, by the place of the call that computes it.
    """

    x: Tensor
    y: Tensor
    mask: Tensor
    kept: dict[object, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: Rows, dtype: torch.dtype) -> CohortRows:
        """Returns x [sites, n, *shape], y [sites, n] and mask [sites, n] as one batch, x in the model's own type."""
        x, y, mask = rows
        if x.is_floating_point():
            x = x.to(dtype)
        return cls(x.flatten(0, 1), y.flatten(0, 1), mask)

    @property
    def sites(self) -> int:
        """The number of sites."""
        return self.mask.shape[0]

    def losses(self, outputs: Tensor) -> Tensor:
        """Returns each site's mean loss [sites] over its rows of known classes."""
        mask = self.mask
        if not self.y.is_floating_point():
            mask = mask * (self.y >= 0).view_as(mask)
        return site_means(row_losses(outputs, self.y).view_as(mask), mask)

    def scores(self, outputs: Tensor) -> Tensor:
        """Returns each site's accuracy, or RMSE for floating-point y, [sites]."""
        if self.y.is_floating_point():
            return site_means(row_losses(outputs, self.y).view_as(self.mask), self.mask).sqrt()
        return site_means((outputs.argmax(-1) == self.y).to(self.mask.dtype).view_as(self.mask), self.mask)


def site_means(values: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean of values [sites, n] over each site's rows where the mask [sites, n] is 1."""
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)


def concatenate(*parts: Rows) -> Rows:
    """Returns several (x, y, mask) of the same sites as one, along their rows."""
    x, y, mask = (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
    return x, y, mask
