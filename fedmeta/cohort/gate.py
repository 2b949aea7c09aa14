"""Do no harm: each site chooses on its support rows alone how many inner steps to take, zero included.

Cross-validation: a site's support rows are dealt to folds in turn (they come in a stratified order); it adapts on all
folds but one and is judged on that one, after every number of steps. It then takes the number with the smallest mean
loss over its rows, unless not adapting at all is as good within a quarter of a standard error: of two choices that
cannot be told apart, the simpler one (after Breiman et al. 1984, section 3.4.3; a whole standard error cost two points
on the training sites of HAR and the digits).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedmeta.cohort.accumulate import Scores
from fedmeta.task import Batch, Rows

FOLDS = 5
"""Into how many parts a site's support rows are dealt; a site with fewer rows leaves one row out at a time."""


def choose_steps(evaluate: Callable[[Batch], Scores], support: Rows, margin: float = 0.25) -> Tensor:
    """Returns the number of inner steps [sites] that each site chooses on its support rows.

    Args:
        evaluate: Scores and losses [tasks, steps + 1] of a batch in which every site stands `FOLDS` times, one task per
            fold, folds of a site next to one another.
        support: x [sites, n, *shape], y [sites, n], mask [sites, n]: the rows that the sites adapt on.
        margin: By how many standard errors adapting must beat not adapting.
    """
    x, y, mask = (tensor.repeat_interleave(FOLDS, 0) for tensor in support)
    place = (support[2].cumsum(1) - 1).long().repeat_interleave(FOLDS, 0)
    held = (place % FOLDS == torch.arange(FOLDS, device=mask.device).repeat(len(support[2]))[:, None]).to(mask.dtype)
    losses = evaluate(Batch((x, y, mask * (1 - held)), (x, y, mask * held))).loss
    losses = losses.reshape(len(support[2]), FOLDS, -1).nan_to_num(nan=torch.inf)
    rows = (mask * held).sum(1).reshape(-1, FOLDS, 1).to(losses.dtype)
    mean = _mean(losses, rows)
    best = mean.argmin(1)
    gains = losses[:, :, :1] - losses.gather(2, best[:, None, None].expand(-1, FOLDS, 1))
    spread = _mean((gains - _mean(gains, rows)[:, None]).square(), rows).sqrt()[:, 0]
    folds = (rows[:, :, 0] > 0).sum(1).clamp(min=2)
    sure = _mean(gains, rows)[:, 0] > margin * spread / (folds - 1).to(spread.dtype).sqrt()
    return torch.where(sure, best, 0)


def _mean(values: Tensor, rows: Tensor) -> Tensor:
    """Returns the mean over folds [sites, k] of values [sites, folds, k], weighted by the folds' rows."""
    return torch.where(rows > 0, values * rows, 0.0).sum(1) / rows.sum(1).clamp(min=1)
