"""The units of regression targets: a model learns them with mean 0 and variance 1, people read their own units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Values = TypeVar("Values", Tensor, Floats)
TargetKind = Literal["standardise", "log", "none"]

TARGET_MEAN, TARGET_SCALE = "standardisation.target_mean", "standardisation.target_scale"
"""The entries of a meta-state that hold a `TargetScale`; absent for classes."""


def _one(value: float) -> Floats:
    return np.full(1, value)


@dataclass(frozen=True, eq=False)
class TargetScale:
    """What targets are standardized by: (y - mean) / scale, or (log y - mean) / scale.

    Attributes:
        mean: float64 [targets], in the targets' units (or those of their logarithm).
        scale: The same; the standard deviation, or 1 for constant targets.
        log: Whether the logarithm of a target is standardized.
    """

    mean: Floats = field(default_factory=lambda: _one(0.0))
    scale: Floats = field(default_factory=lambda: _one(1.0))
    log: bool = False

    @classmethod
    def of(cls, meta_state: Mapping[str, Tensor], *, log: bool) -> TargetScale:
        """Returns the scale that a meta-state holds; the identity where it holds none, as for classes."""
        if TARGET_MEAN not in meta_state:
            return cls()
        mean, scale = (meta_state[name].double().cpu().numpy() for name in (TARGET_MEAN, TARGET_SCALE))
        return cls(mean, scale, log)

    @property
    def identity(self) -> bool:
        """Whether targets stay as they are."""
        return not self.log and not self.mean.any() and bool((self.scale == 1).all())

    def standardize(self, y: Values) -> Values:
        """Returns targets [...] or, of several, [..., targets] in standard units, in float64."""
        if self.identity:
            return y
        if isinstance(y, Tensor):
            own = y.double()
            mean, scale = self._tensors(own)
            return ((own.log() if self.log else own) - mean) / scale
        found: Floats = ((np.log(y) if self.log else y) - self._like(self.mean)) / self._like(self.scale)
        return found

    def restore(self, z: Values) -> Values:
        """Returns targets in their own units, in float64, of what `standardize` gives.

        Of a logarithm it is the exponential: where errors are symmetric in the logarithm, the median and not the mean.
        """
        if self.identity:
            return z
        if isinstance(z, Tensor):
            mean, scale = self._tensors(z)
            own = z.double() * scale + mean
            return own.exp() if self.log else own
        with np.errstate(over="ignore"):
            found: Floats = z.astype(np.float64) * self._like(self.scale) + self._like(self.mean)
            return np.exp(found) if self.log else found

    def _like(self, value: Floats) -> Floats | np.float64:
        return value if len(value) > 1 else value[0]

    def _tensors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, scale = (torch.from_numpy(np.asarray(self._like(v))).to(like.device) for v in (self.mean, self.scale))
        return mean, scale
