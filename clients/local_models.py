"""Strong models of one site's own rows, chosen by cross-validation on these rows alone, for many sites at once.

Multinomial logistic regression, or ridge regression, with an L2 penalty whose strength is cross-validated. A penalized
linear model of n rows lies in their span, W = X^T A, so that all of it happens with the n x n products of rows K = X
X^T.
Logistic regression is solved by Boehning's bound on the Hessian (Boehning 1992), A <- A - (M K / 2 + I / C)^-1
(M (P - Y) + A / C) with M the rows that count, accelerated as by Nesterov: fixed matrices, no line search, so that
every
site, fold and strength is one batch.

From 50 rows on two more are tried: the run's network, trained from its random start by gradient descent with the number
of steps cross-validated, and scikit-learn's boosted trees. Of fewer rows the linear model is the strongest on all real
data tried (experiments/results/local_only.md), and four folds of 20 rows could not show another one to be better.
Trees are left out where rows have more than `TREE_FEATURES` features or there are more than `TREE_CLASSES` classes.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import vmap

from fedmeta import engines
from fedmeta.engines.weighted_sum import Figures
from fedmeta.experiment import Experiment
from fedmeta.learners import Learner, MetaState
from fedmeta.learners.fedavg import Local
from fedmeta.messages import LOCAL_METHODS
from fedmeta.problems import Supervised
from fedmeta.problems.rows import loss as mean_loss
from fedmeta.problems.rows import row_losses
from fedmeta.problems.supervised import OUTPUTS
from fedmeta.randomness import generator
from fedmeta.task import Batch, Task, stack

STRENGTHS = (0.01, 0.1, 1.0, 10.0)
"""C, the inverse penalties that are tried; scikit-learn's default is 1."""

PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)
"""Ridge penalties that are tried for regression."""

FOLDS = 4
ITERATIONS = 150
INTERCEPT = 10.0
"""The square of the constant feature that stands for an intercept: so large that its penalty is felt little."""

RIVALS_FROM = 50
"""From how many rows on the network and the trees are tried."""

TREE_CLASSES, TREE_FEATURES = 10, 256
NETWORK_STEPS, NETWORK_LR = 200, 0.1
"""Gradient steps of the network at most, and their rate: the same for every learner."""

SMALLEST = 1e-6
"""The smallest probability that a class is given, so that a log loss is finite."""

AT_ONCE = 1 << 24
"""How many numbers the products of rows may be that are solved together."""


def fit_rows(
    learner: Learner, meta_state: MetaState, batch: Batch, experiment: Experiment
) -> tuple[Figures, list[int]]:
    """Returns the figures of the best local model of each site's support rows, and which one that is.

    Args:
        learner: The run's learner, for its model and the run's metrics.
        meta_state: The run's initial meta-state.
        batch: The sites' tasks, their rows standardized.
        experiment: The run's description, for the seed.

    Returns:
        The figures [sites, 1] on query rows, and each site's method, as its place in `LOCAL_METHODS`.
    """
    problem = learner.problem
    assert isinstance(problem, Supervised)
    with torch.no_grad():
        classes = int(learner.predict(learner.theta(meta_state), batch.query[0][0, :1]).shape[-1])
    regression = batch.support[1].is_floating_point()
    problems = (FOLDS + 1) * len(PENALTIES if regression else STRENGTHS)
    size = max(1, AT_ONCE // max(1, problems * batch.support[2].shape[1] * max(batch.support[2].shape[1], classes)))
    scored = copy(problem)
    scored.with_outputs = True
    network = Local(scored, inner_lr=NETWORK_LR)
    outputs, methods = [], []
    for at in range(0, batch.sites, size):
        rows = _Rows.of(batch.chunk(at, at + size), classes, experiment.runtime.seed)
        found = rows.linear()
        for site in range(len(found)):
            method = "linear"
            if int(rows.present[site].sum()) >= RIVALS_FROM:
                method, found[site] = _strongest(rows, site, found[site], network, meta_state)
            methods.append(LOCAL_METHODS.index(method))
        outputs.append(found)
    together = torch.cat(outputs)
    y, mask = batch.query[1].cpu(), batch.query[2].cpu().double()
    y = y.double() if regression else y
    figures = vmap(problem.figures)(together, y, mask)
    figures = {"loss": vmap(mean_loss)(together, y, mask), **figures, OUTPUTS: together}
    return {name: value[:, None] for name, value in figures.items()}, methods


@dataclass(frozen=True)
class _Rows:
    """The rows of some sites.

    Attributes:
        x: Their support rows, standardized [sites, n, *shape].
        queries: Their query rows [sites, rows, *shape].
        y: Their labels [sites, n, ...].
        present: 1 for each support row that is there and has a label that the run knows [sites, n].
        folds: The fold of each support row [sites, n]; -1 for what is not there.
        vectors: Support rows as vectors [sites, n, features].
        query_vectors: Query rows as vectors [sites, rows, features].
        classes: How many classes there are, or targets.
        seed: Of the folds and trees.
    """

    x: Tensor
    queries: Tensor
    y: Tensor
    present: Tensor
    folds: Tensor
    vectors: Tensor
    query_vectors: Tensor
    classes: int
    seed: int

    @classmethod
    def of(cls, batch: Batch, classes: int, seed: int) -> _Rows:
        (x, y, mask), other = (tuple(tensor.cpu() for tensor in rows) for rows in (batch.support, batch.query))
        present = mask.double() if y.is_floating_point() else mask.double() * (y >= 0)
        folds = np.stack([_folds(a, b, seed) for a, b in zip(y.numpy(), present.numpy(), strict=True)])
        vectors, queries = _flat(x, other[0], present)
        return cls(x, other[0], y, present, torch.from_numpy(folds), vectors, queries, classes, seed)

    @property
    def regression(self) -> bool:
        """Whether labels are numbers."""
        return self.y.is_floating_point()

    def linear(self) -> Tensor:
        """Returns the linear model's outputs [sites, rows, outputs] on query rows: log probabilities, or numbers."""
        gram = self.vectors @ self.vectors.mT + INTERCEPT
        cross = self.query_vectors @ self.vectors.mT + INTERCEPT
        return _linear(gram, cross, self.y, self.present, _masks(self.present, self.folds), self.folds, self.classes)

    def linear_held_out(self, site: int) -> Tensor:
        """Returns the linear model's outputs [n, outputs] on each support row, fitted and chosen without its fold."""
        one = slice(site, site + 1)
        gram = self.vectors[one] @ self.vectors[one].mT + INTERCEPT
        y, folds = self.y[one], self.folds[one]
        found = torch.zeros(self.y.shape[1], self.classes, dtype=torch.float64)
        for fold in range(FOLDS):
            held = folds[0] == fold
            inner = folds.where(folds != fold, -1)
            present = self.present[one] * (inner >= 0)
            found[held] = _linear(gram, gram, y, present, _masks(present, inner), inner, self.classes)[0][held]
        return found


def _masks(present: Tensor, folds: Tensor) -> Tensor:
    """Returns the rows [sites, FOLDS + 1, n] that each fold's model is fitted to, and at last all."""
    return torch.stack([present * (folds != fold) for fold in range(FOLDS)] + [present], 1)


def _linear(
    gram: Tensor, cross: Tensor, y: Tensor, present: Tensor, masks: Tensor, folds: Tensor, classes: int
) -> Tensor:
    if y.is_floating_point():
        return _ridge(gram, cross, y.double(), present, masks, folds)
    return _logistic(gram, cross, y, present, masks, folds, classes)


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


def _strongest(rows: _Rows, site: int, linear: Tensor, network: Local, meta_state: MetaState) -> tuple[str, Tensor]:
    """Returns the method of the lowest held-out loss on a site's support rows, and its outputs on the query rows.

    Every method chooses its own settings without the rows of the fold that it is scored on. A rival must beat the
    linear model by one standard error of the paired difference: one that is better by less is mostly luck, which cost
    half a point on 21 persons with 100 rows each.

    Args:
        rows: The rows.
        site: The site.
        linear: The linear model's outputs on the site's query rows.
        network: What trains the run's network.
        meta_state: Where it starts.
    """
    here = rows.present[site] > 0
    y, folds = rows.y[site][here], rows.folds[site][here]
    if not rows.regression and len(set(y.tolist())) < 2:
        return "linear", linear
    losses = {"linear": row_losses(rows.linear_held_out(site)[here], y)}
    losses["network"], steps = _network_losses(rows.x[site][here], y, folds, network, meta_state)
    trees = rows.classes <= TREE_CLASSES and rows.vectors.shape[-1] <= TREE_FEATURES
    if trees:
        x = rows.vectors[site][here].numpy()
        held_out = torch.zeros(len(y), rows.classes, dtype=torch.float64)
        for fold in range(FOLDS):
            held = (folds == fold).numpy()
            held_out[held] = _trees(x[~held], y[~held].numpy(), x[held], rows.classes, rows.seed)
        losses["trees"] = row_losses(held_out, y)
    best = min(losses, key=lambda name: float(losses[name].mean()))
    if not is_better(losses[best], losses["linear"]):
        best = "linear"
    if best == "network":
        own = network.adapt(meta_state, (rows.x[site][here], y), steps)
        with torch.no_grad():
            outputs = network.predict(own, rows.queries[site]).double()
        return best, outputs if rows.regression else _normalized(outputs.log_softmax(-1))
    if best == "trees":
        return best, _trees(x, y.numpy(), rows.query_vectors[site].numpy(), rows.classes, rows.seed)
    return best, linear


def is_better(rival: Tensor, linear: Tensor) -> bool:
    """Returns whether a rival's held-out losses [n] are below the linear model's by one SE of the paired difference."""
    gain = linear - rival
    return bool(gain.mean() > gain.std() / len(gain) ** 0.5)


def _network_losses(x: Tensor, y: Tensor, folds: Tensor, network: Local, meta_state: MetaState) -> tuple[Tensor, int]:
    """Returns the network's held-out losses [n], steps chosen by the other folds, and the steps that all choose."""
    parts = [folds == fold for fold in range(FOLDS)]
    batch = stack([Task((x[~held], y[~held]), (x[held], y[held])) for held in parts])
    outputs = engines.evaluate(network, meta_state, batch, steps=NETWORK_STEPS)[OUTPUTS].double().cpu()
    by_step = torch.zeros(NETWORK_STEPS + 1, len(y), dtype=torch.float64)
    for held, found in zip(parts, outputs, strict=True):
        by_step[:, held] = vmap(row_losses, (0, None))(found[:, : int(held.sum())], y[held])
    by_step = by_step.nan_to_num(nan=torch.inf)
    losses = torch.empty(len(y), dtype=torch.float64)
    for held in parts:
        losses[held] = by_step[by_step[:, ~held].mean(1).argmin(), held]
    return losses, int(by_step.mean(1).argmin())


def _trees(x: NDArray[np.float64], y: NDArray[Any], other: NDArray[np.float64], classes: int, seed: int) -> Tensor:
    """Returns what boosted trees fitted to rows give for others: log probabilities [rows, classes], or numbers."""
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    settings = {"max_iter": 50, "max_depth": 3, "min_samples_leaf": 5, "random_state": seed % 2**32}
    if np.issubdtype(y.dtype, np.floating):
        targets = y.reshape(len(y), -1).T
        return torch.from_numpy(
            np.stack([HistGradientBoostingRegressor(**settings).fit(x, each).predict(other) for each in targets], 1)
        )
    found = np.full((len(other), classes), SMALLEST)
    kinds = np.unique(y)
    if len(kinds) < 2:
        found[:, kinds] = 1.0
    else:
        model = HistGradientBoostingClassifier(**settings).fit(x, y)
        found[:, model.classes_] = np.maximum(model.predict_proba(other), SMALLEST)
    return torch.from_numpy(np.log(found / found.sum(1, keepdims=True)))
