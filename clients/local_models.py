"""Strong models of one site's own rows, chosen by cross-validation on these rows alone, for many sites at once.

Multinomial logistic regression, or ridge regression, with an L2 penalty whose strength is cross-validated. A penalized
linear model of n rows lies in their span, W = X^T A, so that all of it happens with the n x n products of rows K = X
X^T.
Logistic regression is solved by Boehning's bound on the Hessian (Boehning 1992), A <- A - (M K / 2 + I / C)^-1
(M (P - Y) + A / C) with M the rows that count, accelerated as by Nesterov: fixed matrices, no line search, so that
every
site, fold and strength is one batch. From 50 rows on scikit-learn's boosted trees are a candidate as well.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import vmap

from fedmeta.engines.weighted_sum import Figures
from fedmeta.experiment import Experiment
from fedmeta.learners import Learner
from fedmeta.problems import Parameters, Supervised
from fedmeta.problems.rows import loss as mean_loss
from fedmeta.problems.supervised import OUTPUTS
from fedmeta.randomness import generator
from fedmeta.task import Batch

STRENGTHS = (0.01, 0.1, 1.0, 10.0)
"""C, the inverse penalties that are tried; scikit-learn's default is 1."""

PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)
"""Ridge penalties that are tried for regression."""

FOLDS = 4
ITERATIONS = 150
INTERCEPT = 10.0
"""The square of the constant feature that stands for an intercept: so large that its penalty is felt little."""

TREES_FROM, TREE_CLASSES, TREE_FEATURES = 50, 10, 256
SMALLEST = 1e-6
"""The smallest probability that a class is given, so that a log loss is finite."""

AT_ONCE = 1 << 24
"""How many numbers the products of rows may be that are solved together."""


def fit_rows(learner: Learner, start: Parameters, batch: Batch, experiment: Experiment) -> Figures:
    """Returns the figures [sites, 1] on query rows of the best local model of each site's support rows.

    Args:
        learner: The run's learner, for the width of its outputs and the run's metrics.
        start: The run's initial parameters.
        batch: The sites' tasks, their rows standardized.
        experiment: The run's description, for the seed.
    """
    problem = learner.problem
    assert isinstance(problem, Supervised)
    with torch.no_grad():
        classes = int(learner.predict(start, batch.query[0][0, :1]).shape[-1])
    regression = batch.support[1].is_floating_point()
    problems = (FOLDS + 1) * len(PENALTIES if regression else STRENGTHS)
    size = max(1, AT_ONCE // max(1, problems * batch.support[2].shape[1] * max(batch.support[2].shape[1], classes)))
    parts = [_fit(batch.chunk(at, at + size), classes, experiment.runtime.seed) for at in range(0, batch.sites, size)]
    outputs = torch.cat(parts)
    y, mask = batch.query[1].cpu(), batch.query[2].cpu().double()
    y = y.double() if regression else y
    figures = {"loss": vmap(mean_loss)(outputs, y, mask), **vmap(problem.figures)(outputs, y, mask), OUTPUTS: outputs}
    return {name: value[:, None] for name, value in figures.items()}


def _fit(batch: Batch, classes: int, seed: int) -> Tensor:
    """Returns outputs [sites, rows, classes] (log probabilities) or [sites, rows, targets] on the sites' query rows."""
    (x, y, mask), other = (tuple(tensor.cpu() for tensor in rows) for rows in (batch.support, batch.query))
    rows, queries = _flat(x, other[0], mask)
    gram = rows @ rows.mT + INTERCEPT
    cross = queries @ rows.mT + INTERCEPT
    folds = torch.from_numpy(np.stack([_folds(a, b, seed) for a, b in zip(y.numpy(), mask.numpy(), strict=True)]))
    present = mask.double()
    # One mask a fold, and one of all rows.
    masks = torch.stack([present * (folds != fold) for fold in range(FOLDS)] + [present], 1)
    if y.is_floating_point():
        return _ridge(gram, cross, y.double(), present, masks, folds)
    outputs = _logistic(gram, cross, y, present, masks, folds, classes)
    for site in range(len(y)):
        if int(present[site].sum()) >= TREES_FROM and classes <= TREE_CLASSES and rows.shape[-1] <= TREE_FEATURES:
            outputs[site] = _or_trees(site, rows, queries, y, present, folds, outputs[site], gram, masks, classes, seed)
    return outputs


def _flat(x: Tensor, other: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Returns support and query rows as vectors [sites, n, features]; codes of symbols one-hot; padding zero."""
    if not x.is_floating_point():
        codes = 1 + int(max(int(x.max()), int(other.max())))
        x, other = (torch.nn.functional.one_hot(rows, codes) for rows in (x, other))
    return x.flatten(2).double() * mask.double()[..., None], other.flatten(2).double()


def _folds(y: NDArray[Any], mask: NDArray[Any], seed: int) -> NDArray[np.int64]:
    """Returns the fold of each row [n], each class spread evenly over folds; -1 for padding."""
    here = np.flatnonzero(mask > 0)
    drawn = generator(seed, "local folds", len(here)).permutation(here)
    labels = y[drawn] if not np.issubdtype(y.dtype, np.floating) else np.zeros(len(drawn))
    order = drawn[np.argsort(labels, kind="stable")]
    folds = np.full(len(y), -1, dtype=np.int64)
    folds[order] = np.arange(len(order)) % FOLDS
    return folds


def _logistic(
    gram: Tensor, cross: Tensor, y: Tensor, present: Tensor, masks: Tensor, folds: Tensor, classes: int
) -> Tensor:
    """Returns log probabilities [sites, rows, classes] of query rows under the strength that cross-validation picks."""
    strengths = torch.tensor(STRENGTHS, dtype=torch.float64)
    own = torch.nn.functional.one_hot(y.clamp(min=0), classes).double() * present[..., None]
    absent = torch.where(own.sum(1) > 0, 0.0, -torch.inf)[:, None, None, None, :]  # [sites, 1, 1, 1, classes]
    count = masks[:, None, :, :, None]  # [sites, 1, folds, n, 1]
    kernel = gram[:, None, None]
    pull = (1 / strengths)[None, :, None, None, None]
    eye = torch.eye(gram.shape[-1], dtype=torch.float64)
    step = torch.linalg.inv(count * kernel / 2 + pull * eye)
    target = own[:, None, None]
    weights = torch.zeros(*step.shape[:-1], classes, dtype=torch.float64)
    ahead, before = weights, weights
    for iteration in range(ITERATIONS):
        found = (kernel @ ahead + absent).softmax(-1)
        weights = ahead - step @ (count * (found - target) + pull * ahead)
        ahead = weights + iteration / (iteration + 3) * (weights - before)
        before = weights
    scores = kernel @ weights + absent
    losses = -(scores.log_softmax(-1).clamp(min=np.log(SMALLEST)) * target).sum(-1)  # [sites, strengths, folds + 1, n]
    held = torch.stack([folds == fold for fold in range(FOLDS)], 1)[:, None]
    best = _best((losses[:, :, :FOLDS] * held).sum(2), present, STRENGTHS.index(1.0))
    chosen = weights[torch.arange(len(best)), best, FOLDS]
    found = (cross @ chosen + absent[:, 0, 0]).log_softmax(-1)
    return _normalized(found)


def _best(losses: Tensor, present: Tensor, usual: int) -> Tensor:
    """Returns the setting of each site [sites]: the usual one unless the best one's held-out loss is lower by one SE.

    On twenty rows the smallest of several cross-validated losses is mostly luck (Breiman et al. 1984, section 3.4.3).

    Args:
        losses: Held-out losses [sites, settings, rows].
        present: 1 for each row that is there [sites, rows].
        usual: The usual setting.
    """
    best = losses.sum(-1).argmin(1)
    gain = losses[:, usual] - losses.gather(1, best[:, None, None].expand(-1, 1, losses.shape[2]))[:, 0]
    rows = present.sum(1).clamp(min=1)
    mean = (gain * present).sum(1) / rows
    spread = (((gain - mean[:, None]).square() * present).sum(1) / rows).sqrt() / (rows - 1).clamp(min=1).sqrt()
    return torch.where(mean > spread, best, torch.full_like(best, usual))


def _normalized(log_probabilities: Tensor) -> Tensor:
    """Returns log probabilities of which none is below that of `SMALLEST`."""
    found: Tensor = log_probabilities.clamp(min=np.log(SMALLEST)).log_softmax(-1)
    return found


def _ridge(gram: Tensor, cross: Tensor, y: Tensor, present: Tensor, masks: Tensor, folds: Tensor) -> Tensor:
    """Returns predictions [sites, rows, targets] of query rows under the penalty that cross-validation picks.

    Args:
        gram: Inner products of support rows [sites, n, n].
        cross: Those of query rows with them [sites, rows, n].
        y: Targets [sites, n] or [sites, n, targets]; one penalty serves all of a site's.
        present: 1 for each row that is there [sites, n].
        masks: The rows that each fold trains on, and at last all [sites, folds + 1, n].
        folds: The fold of each row [sites, n].
    """
    penalties = torch.tensor(PENALTIES, dtype=torch.float64)[None, :, None, None, None]
    y = y.reshape(*y.shape[:2], -1)
    counts = masks.sum(-1)[..., None, None].clamp(min=1)
    means = (masks[..., None] * y[:, None]).sum(2, keepdim=True) / counts  # [sites, folds + 1, 1, targets]
    centered = masks[..., None] * (y[:, None] - means)
    system = masks[:, None, :, :, None] * gram[:, None, None] + penalties * torch.eye(gram.shape[-1]).double()
    weights = torch.linalg.solve(system, centered[:, None].expand(*system.shape[:-1], y.shape[-1]))
    fitted = gram[:, None, None] @ weights + means[:, None]
    held = torch.stack([folds == fold for fold in range(FOLDS)], 1)[:, None]
    errors = (fitted - y[:, None, None]).square().mean(-1) * present[:, None, None]
    best = (errors[:, :, :FOLDS] * held).sum((2, 3)).argmin(1)
    chosen = weights[torch.arange(len(best)), best, FOLDS]
    predicted: Tensor = cross @ chosen + means[:, FOLDS]
    return predicted


def _or_trees(
    site: int,
    rows: Tensor,
    queries: Tensor,
    y: Tensor,
    present: Tensor,
    folds: Tensor,
    linear: Tensor,
    gram: Tensor,
    masks: Tensor,
    classes: int,
    seed: int,
) -> Tensor:
    """Returns boosted trees' log probabilities on a site's query rows where their held-out loss is better."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    here = present[site] > 0
    x, labels, own = rows[site][here].numpy(), y[site][here].numpy(), folds[site][here].numpy()
    if len(np.unique(labels)) < 2:
        return linear

    def fitted(train: NDArray[np.bool_], to: NDArray[np.float64]) -> NDArray[np.float64]:
        found = np.full((len(to), classes), SMALLEST)
        kinds = np.unique(labels[train])
        if len(kinds) < 2:
            found[:, kinds] = 1.0
        else:
            model = HistGradientBoostingClassifier(
                max_iter=50, max_depth=3, min_samples_leaf=5, random_state=seed % 2**32
            )
            model.fit(x[train], labels[train])
            found[:, model.classes_] = np.maximum(model.predict_proba(to), SMALLEST)
        shares: NDArray[np.float64] = found / found.sum(1, keepdims=True)
        return shares

    trees = np.empty(len(labels))
    for fold in range(FOLDS):
        held = own == fold
        trees[held] = -np.log(fitted(~held, x[held])[np.arange(held.sum()), labels[held]])
    # The linear model's held-out loss, by the same folds.
    one = slice(site, site + 1)
    base = np.empty(len(labels))
    for fold in range(FOLDS):
        held = own == fold
        inner = folds[one].where(folds[one] != fold, -1)
        count = masks[one, fold]
        again = torch.stack([count * (inner != part) for part in range(FOLDS)] + [count], 1)
        found = _logistic(gram[one], gram[one], y[one], count, again, inner, classes)[0][here].numpy()
        base[held] = -found[held, labels[held]]
    if trees.mean() >= base.mean():
        return linear
    return torch.from_numpy(np.log(fitted(np.ones(len(labels), dtype=bool), queries[site].numpy())))
