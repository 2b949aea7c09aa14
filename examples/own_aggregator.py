"""An aggregator of one's own: the geometric median of the sites' gradients (RFA, Pillutla et al. 2022)."""

from torch import Tensor


def geometric_median(gradients: Tensor) -> Tensor:
    """Returns the point [values] with the least sum of distances to gradients [sites, values], by Weiszfeld's steps."""
    found = gradients.mean(0)
    for _ in range(20):
        weights = 1 / (gradients - found).norm(dim=1).clamp(min=1e-6)
        found = (weights[:, None] * gradients).sum(0) / weights.sum()
    return found
