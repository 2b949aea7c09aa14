"""Strong models of one site's own rows, chosen by cross-validation on these rows alone.

A linear model with an L2 penalty whose strength is cross-validated; from 50 rows on boosted trees as well. Both are
scikit-learn's. A penalized linear model of n rows lies in the span of these rows, so that it is fitted in n dimensions at
most, whatever the number of features.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmeta.experiment import Experiment
from fedmeta.learners import Learner
from fedmeta.problems import Parameters, RowMetric, Supervised
from fedmeta.problems.row_metrics import Predictions, on_predictions
from fedmeta.problems.rows import loss as row_loss
from fedmeta.task import Task, rows_mask

Floats = NDArray[np.float64]

STRENGTHS = (0.01, 0.1, 1.0, 10.0)
"""Inverse penalties that are tried; scikit-learn's default is 1."""

PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)
"""Ridge penalties that are tried for regression."""

FOLDS = 4
TREES_FROM = 50
SMALLEST = 1e-6
"""The smallest probability that a class is given, so that a log loss is finite."""


def fit_rows(learner: Learner, start: Parameters, task: Task, experiment: Experiment) -> dict[str, Tensor]:
    """Returns the figures on a task's query rows of the best local model of its support rows.

    Args:
        learner: The run's learner, for the width of its outputs and the run's metrics.
        start: The run's initial parameters.
        task: The site's task, its rows standardised.
        experiment: The run's description, for the seed.
    """
    problem = learner.problem
    assert isinstance(problem, Supervised)
    (x, y), (qx, qy) = (_known(rows) for rows in task)
    seed = experiment.runtime.seed
    if y.is_floating_point():
        outputs = torch.from_numpy(_regression(_flat(x, 0), y.double().numpy(), _flat(qx, 0), seed))[:, None]
    else:
        with torch.no_grad():
            classes = int(learner.predict(start, task.query[0][:1]).shape[-1])
        codes = 1 + int(max(x.max(), qx.max())) if not x.is_floating_point() and len(x) and len(qx) else 0
        probabilities = _classification(_flat(x, codes), y.numpy(), _flat(qx, codes), classes, seed)
        outputs = torch.from_numpy(np.log(probabilities))
    mask = torch.ones(len(qy), dtype=torch.float64)
    target = qy.double() if qy.is_floating_point() else qy
    figures = {"loss": row_loss(outputs, target, mask)}
    for metric in problem.metrics:
        if isinstance(metric, RowMetric) and metric.on_tensors is not None:
            figures[metric.name] = metric.on_tensors(outputs, target, mask)
        elif isinstance(metric, RowMetric):
            known = target.numpy() >= 0 if not target.is_floating_point() else np.ones(len(target), dtype=bool)
            raw = outputs.numpy()[known]
            found = (
                Predictions(target.numpy()[known], np.exp(raw), np.empty(0), raw.shape[1], problem.positive)
                if not target.is_floating_point()
                else Predictions(target.numpy(), np.empty((len(raw), 0)), raw.reshape(target.shape), 0)
            )
            figures[metric.name] = torch.tensor(on_predictions(metric, found), dtype=torch.float64)
    return {name: value.double() for name, value in figures.items()}


def _known(rows: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    keep = rows_mask(rows) > 0
    return rows[0][keep].cpu(), rows[1][keep].cpu()


def _flat(x: Tensor, codes: int) -> Floats:
    """Returns rows as vectors [n, features]; codes of symbols one-hot."""
    if codes:
        x = torch.nn.functional.one_hot(x, codes)
    flat: Floats = x.flatten(1).double().numpy() if len(x) else np.empty((0, x[:1].numel() or 1))
    return flat


def _in_span(x: Floats, other: Floats) -> tuple[Floats, Floats]:
    """Returns rows and other rows in an orthonormal basis of the span of the first, where that is smaller."""
    if len(x) >= x.shape[1]:
        return x, other
    basis = np.linalg.qr(x.T)[0]
    return x @ basis, other @ basis


def _classification(x: Floats, y: NDArray[np.int64], other: Floats, classes: int, seed: int) -> Floats:
    """Returns probabilities [rows, classes] of other rows."""
    from sklearn.linear_model import LogisticRegression

    present = np.unique(y)
    if len(present) < 2:
        constant = np.full((len(other), classes), SMALLEST)
        constant[:, present] = 1.0
        alone: Floats = constant / constant.sum(1, keepdims=True)
        return alone
    full, full_other = x, other
    x, other = _in_span(x, other)
    folds = _folds(y, seed)
    models: list[tuple[float, Any, Floats, Floats]] = []
    for strength in STRENGTHS:
        model = LogisticRegression(C=strength, max_iter=300)
        models.append((_cost(model, x, y, folds, classes), model, x, other))
    if len(y) >= TREES_FROM and classes <= 10 and full.shape[1] <= 256:
        from sklearn.ensemble import HistGradientBoostingClassifier

        trees = HistGradientBoostingClassifier(max_iter=50, max_depth=3, min_samples_leaf=5, random_state=seed % 2**32)
        models.append((_cost(trees, full, y, folds, classes), trees, full, full_other))
    _, best, own, rows = min(models, key=lambda entry: entry[0])
    return _probabilities(best, own, y, rows, classes)


def _probabilities(model: Any, x: Floats, y: NDArray[np.int64], other: Floats, classes: int) -> Floats:
    if len(np.unique(y)) < 2:
        return _constant(y, len(other), classes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(x, y)
    found = np.full((len(other), classes), SMALLEST)
    if len(other):
        found[:, model.classes_] = np.maximum(model.predict_proba(other), SMALLEST)
    shares: Floats = found / found.sum(1, keepdims=True)
    return shares


def _constant(y: NDArray[np.int64], rows: int, classes: int) -> Floats:
    found = np.full((rows, classes), SMALLEST)
    found[:, np.unique(y)] = 1.0
    shares: Floats = found / found.sum(1, keepdims=True)
    return shares


def _folds(y: NDArray[Any], seed: int) -> NDArray[np.int64]:
    """Returns the fold of each row [n], each class spread evenly."""
    drawn = np.random.default_rng(seed).permutation(len(y))
    order = drawn[np.argsort(y[drawn], kind="stable")]
    folds = np.empty(len(y), dtype=np.int64)
    folds[order] = np.arange(len(y)) % min(FOLDS, len(y))
    return folds


def _cost(model: Any, x: Floats, y: NDArray[np.int64], folds: NDArray[np.int64], classes: int) -> float:
    """Returns the cross-validated log loss."""
    losses = np.empty(len(y))
    for fold in np.unique(folds):
        held = folds == fold
        found = _probabilities(model, x[~held], y[~held], x[held], classes)
        losses[held] = -np.log(found[np.arange(held.sum()), y[held]])
    # A class that only the held-out rows have costs every model the same.
    return float(losses.mean())


def _regression(x: Floats, y: Floats, other: Floats, seed: int) -> Floats:
    """Returns predictions [rows] of other rows."""
    from sklearn.linear_model import Ridge

    if len(y) < 2 or y.ndim > 1:
        return np.full(len(other), y.mean() if len(y) else 0.0)
    folds = _folds(np.zeros(len(y)), seed)
    full, full_other = x, other
    x, other = _in_span(x, other)
    candidates: list[tuple[Any, Floats, Floats]] = [(Ridge(alpha=penalty), x, other) for penalty in PENALTIES]
    if len(y) >= TREES_FROM and full.shape[1] <= 256:
        from sklearn.ensemble import HistGradientBoostingRegressor

        trees = HistGradientBoostingRegressor(max_iter=50, max_depth=3, min_samples_leaf=5, random_state=seed % 2**32)
        candidates.append((trees, full, full_other))
    costs = []
    for model, own, _ in candidates:
        errors = np.empty(len(y))
        for fold in np.unique(folds):
            held = folds == fold
            errors[held] = model.fit(own[~held], y[~held]).predict(own[held]) - y[held]
        costs.append(float((errors**2).mean()))
    best, own, rows = candidates[int(np.argmin(costs))]
    predicted: Floats = best.fit(own, y).predict(rows) if len(rows) else np.empty(0)
    return predicted
