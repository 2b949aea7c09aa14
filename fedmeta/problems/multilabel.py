r"""Several labels of 0 or 1 for each row, such as the diagnoses of a stay: independent logistic outputs on one model.

With logits z of a row, label k has probability p_k = sigmoid(z_k). The objective is the binary cross-entropy of each
label, -y log p - (1 - y) log(1 - p), the mean over labels and rows. Labels are columns of numbers, `data.label` a list.
A problem of rows: features are encoded, imputed and standardized as for any table, and so are those of a site to come.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from fedmeta.errors import FedmetaError
from fedmeta.problems.metric import Metric
from fedmeta.problems.problem import Data, Parameters
from fedmeta.problems.row_metrics import Predictions, RowMetric
from fedmeta.problems.rows import masked_mean
from fedmeta.problems.supervised import Supervised
from fedmeta.task import rows_mask

NAME = "fedmeta.problems.multilabel:MultiLabel"
"""How an experiment names the problem."""

Floats = NDArray[np.float64]


class MultiLabel(Supervised):
    """A model whose outputs are probabilities of labels.

    Args:
        model: As for `Supervised`: a module with an output for each label.
        labels: The labels' names; a metric of each is named after them.
        metrics: Not used: metrics are those of labels, the mean over labels and of each one.
        score: The headline metric: "label_accuracy", "auroc", "auprc" or "bce".
        **settings: As for `Supervised`.
    """

    def __init__(
        self,
        model: Any,
        labels: Sequence[str] = (),
        metrics: Sequence[Metric] | None = None,
        score: str = "label_accuracy",
        **settings: Any,
    ) -> None:
        found = {each.name: each for each in metrics_of(labels)}
        if score not in found:
            raise FedmetaError(f'[problem] score = "{score}": it must be one of {", ".join(list(found)[:20])}')
        super().__init__(model, (found.pop(score), *found.values()), **settings)

    def predict(self, parameters: Parameters, x: Tensor) -> Tensor:
        """Returns each label's probability [n, labels] for inputs [n, *shape]."""
        return self.network(parameters, x).sigmoid()

    def inner(self, parameters: Parameters, data: Data) -> Tensor:
        """Returns the binary cross-entropy, the mean over labels and rows."""
        logits = self.network(parameters, data[0])
        y = data[1].reshape(logits.shape).to(logits.dtype)
        each = binary_cross_entropy_with_logits(logits, y, reduction="none")
        return masked_mean(each.mean(-1), rows_mask(data))


def metrics_of(labels: Sequence[str]) -> tuple[RowMetric, ...]:
    """Returns the metrics of labels: accuracy, AUROC, AUPRC and cross-entropy, mean over labels and of each label."""
    metric = partial(RowMetric, regression=True)
    found = [
        metric("label_accuracy", True, "", 0, 1, on_tensors=_accuracy),
        metric("bce", False, "", 0, on_tensors=_cross_entropy),
        metric("auroc", True, "", 0, 1, on_predictions=partial(_over_labels, _auroc, None)),
        metric("auprc", True, "", 0, 1, on_predictions=partial(_over_labels, _auprc, None)),
    ]
    for place, name in enumerate(labels if len(labels) > 1 else ()):
        found.append(metric(f"auroc_{name}", True, "", 0, 1, on_predictions=partial(_over_labels, _auroc, place)))
        found.append(metric(f"auprc_{name}", True, "", 0, 1, on_predictions=partial(_over_labels, _auprc, place)))
    return tuple(found)


def check_labels(y: NDArray[Any], names: Sequence[str], rows_of: Callable[[int], str]) -> None:
    """Checks that every label of every row is 0 or 1; raises `FedmetaError` at the first that is not.

    Args:
        y: Labels [rows] or [rows, labels].
        names: The labels' names.
        rows_of: Describes the site of a row.
    """
    wrong = np.argwhere(~np.isin(y.reshape(len(y), -1), (0, 1)))
    if len(wrong):
        row, place = wrong[0].tolist()
        value = y.reshape(len(y), -1)[row, place]
        raise FedmetaError(f'{rows_of(row)}: label "{names[place]}" is {value:g} in some row; it must be 0 or 1 in all')


def _accuracy(outputs: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    right = ((outputs.reshape(len(y), -1) > 0.5) == (y.reshape(len(y), -1) > 0.5)).to(outputs.dtype)
    return masked_mean(right.mean(-1), mask)


def _cross_entropy(outputs: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    p = outputs.reshape(len(y), -1).clamp(torch.finfo(outputs.dtype).tiny, 1 - torch.finfo(outputs.dtype).eps)
    truth = y.reshape(len(y), -1).to(p.dtype)
    return masked_mean(-(truth * p.log() + (1 - truth) * torch.log1p(-p)).mean(-1), mask)


def _over_labels(compute: Callable[[Floats, Floats], float], place: int | None, found: Predictions) -> float:
    """Returns a figure of one label, or the mean over the labels where it is defined; NaN where it is at none."""
    y, p = (each.reshape(len(found.y), -1) for each in (found.y, found.outputs))
    if place is not None:
        return compute(y[:, place], p[:, place])
    values = [compute(y[:, label], p[:, label]) for label in range(y.shape[1])]
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan


def _auroc(truth: Floats, probability: Floats) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(truth, probability)) if 0 < truth.sum() < len(truth) else math.nan


def _auprc(truth: Floats, probability: Floats) -> float:
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(truth, probability)) if truth.sum() else math.nan
