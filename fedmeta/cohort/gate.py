"""Do no harm: each site chooses on its support rows alone how many inner steps to take, zero included.

Cross-validation: a site's support rows are dealt to folds in turn (they come in a stratified order); it adapts on all
folds but one and is judged on that one, after every number of steps. It takes the usual number, unless not adapting
gets fewer rows wrong and costs less by more than a standard error: of two choices that cannot be told apart, the one
that holds for everyone is the better guess (the rule of Breiman et al. 1984, section 3.4.3). A number in between must
beat both without a doubt, by several standard errors: there are more of them to be lucky, and they leave no site as it
was. What a number of steps costs is the share of rows it gets wrong plus its mean loss, capped: on few rows a loss
alone is carried away by one confident mistake, and a share of errors alone takes steps of several points. For
regression it is the mean squared error.

A row judges only where other folds hold its class too: of a class that a site has one row of, leaving that row out
leaves nothing to learn from. Where no row can judge, as in one-shot tasks, the usual number it is.

The rule was chosen on validation sites of HAR, the digits and the writers. A number in between that need only beat the
usual one, by one standard error, lost up to 1.5 points where adapting helps; a cost of which most was loss, without
fewer rows wrong, up to 0.7; three quarters of a standard error another 0.5; two won back little where adapting hurts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedmeta.cohort.accumulate import Scores
from fedmeta.task import Batch, Rows

FOLDS = 5
"""Into how many parts a site's support rows are dealt; a site with fewer rows leaves one row out at a time."""

MARGIN = 1.0
"""By how many standard errors not adapting must beat the usual number of steps."""

NO_DOUBT = 4.0
"""By how many another number of steps must beat both: with five folds a standard error is itself a guess."""

LARGEST_LOSS = 3.0
"""What a fold's mean log loss counts at most, as if each row's class had been given 5 %."""

LARGEST_ERROR = 1e12
"""The same for a mean squared error: anything finite, so that steps which diverge can be compared with others."""


def choose_steps(
    evaluate: Callable[[Batch], Scores],
    support: Rows,
    usual: int | None = None,
    margin: float = MARGIN,
    doubt: float = NO_DOUBT,
) -> Tensor:
    """Returns the number of inner steps [sites] that each site chooses on its support rows; 0 where it has only one.

    Args:
        evaluate: Scores and losses [tasks, steps + 1] of a batch in which every site stands `FOLDS` times, one task per
            fold, folds of a site next to one another.
        support: x [sites, n, *shape], y [sites, n], mask [sites, n]: the rows that the sites adapt on.
        usual: The number of steps to take unless another is better; None for the most.
        margin: By how many standard errors not adapting must be better.
        doubt: By how many another number of steps must be better than both.
    """
    x, y, mask = (tensor.repeat_interleave(FOLDS, 0) for tensor in support)
    place = (support[2].cumsum(1) - 1).long().repeat_interleave(FOLDS, 0)
    held = (place % FOLDS == torch.arange(FOLDS, device=mask.device).repeat(len(support[2]))[:, None]).to(mask.dtype)
    train, judges = mask * (1 - held), mask * held
    if not y.is_floating_point():
        judges = judges * _known(y, train)
    found = evaluate(Batch((x, y, train), (x, y, judges)))
    costs = _costs(found, y.is_floating_point()).reshape(len(support[2]), FOLDS, -1)
    rows = judges.sum(1).reshape(-1, FOLDS, 1).double()
    last = costs.shape[2] - 1
    none = torch.zeros(len(costs), dtype=torch.long, device=costs.device)
    same, best = none + (last if usual is None else min(usual, last)), _mean(costs, rows).argmin(1)
    stays = _surely(costs, rows, none, same, margin)
    better = _surely(costs, rows, best, same, doubt) & _surely(costs, rows, best, none, doubt)
    if not y.is_floating_point():
        wrong = _mean(_errors(found).reshape(costs.shape), rows)
        of_none, of_same, of_best = (wrong.gather(1, each[:, None])[:, 0] for each in (none, same, best))
        stays, better = stays & (of_none < of_same), better & (of_best < of_same)
    chosen = torch.where(better, best, torch.where(stays, none, same))
    return torch.where(support[2].sum(1) > 1, chosen, 0)


def _surely(costs: Tensor, rows: Tensor, one: Tensor, other: Tensor, margin: float) -> Tensor:
    """Returns whether one choice costs less than another by more than `margin` standard errors over folds [sites]."""
    first, second = (costs.gather(2, choice[:, None, None].expand(-1, FOLDS, 1)) for choice in (one, other))
    gain = _mean(second - first, rows)
    spread = _mean((second - first - gain[:, None]).square(), rows).sqrt()
    folds = (rows > 0).sum(1)
    return (gain > margin * spread / (folds.clamp(min=2) - 1).sqrt())[:, 0]


def _known(y: Tensor, train: Tensor) -> Tensor:
    """Returns 1 for each row whose class is among the rows of its task that are trained on, else 0 [tasks, n]."""
    codes = y.clamp(min=0)
    counts = train.new_zeros(len(y), int(codes.max()) + 1 if codes.numel() else 1).scatter_add_(1, codes, train)
    return (counts.gather(1, codes) > 0).to(train.dtype)


def _costs(found: Scores, regression: bool) -> Tensor:
    """Returns what each number of steps costs in each fold [tasks, steps + 1], finite."""
    most = LARGEST_ERROR if regression else LARGEST_LOSS
    losses = found.loss.double().nan_to_num(nan=most, posinf=most).clamp(max=most)
    return losses if regression else losses + _errors(found)


def _errors(found: Scores) -> Tensor:
    """Returns the share of rows that each number of steps gets wrong per fold [tasks, steps + 1]; all if it fails."""
    return torch.where(found.loss.isfinite(), 1 - found.score, 1.0).double()


def _mean(values: Tensor, rows: Tensor) -> Tensor:
    """Returns the mean over folds [sites, k] of values [sites, folds, k], weighted by the folds' rows."""
    return torch.where(rows > 0, values * rows, 0.0).sum(1) / rows.sum(1).clamp(min=1)
