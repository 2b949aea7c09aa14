"""Metrics of predictions on rows, one entry each: a `RowMetric` with what computes it.

`accuracy`, `ece`, `rmse`, `mae`, `brier`, `log_loss` and `nll` are computed in torch, for many sites at once; the
others
by scikit-learn from a site's predictions. A metric is undefined (NaN) where scikit-learn has no value, such as AUROC
with
one class. A row of a class that the run does not know counts as wrong for accuracy, and for nothing else.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import vmap

from fedmeta.errors import FedmetaError, nearest
from fedmeta.importing import load_object
from fedmeta.problems.metric import Metric
from fedmeta.problems.rows import calibration_error, loss, masked_mean, score
from fedmeta.targets import TargetScale

Floats = NDArray[np.float64]

OnTensors = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(outputs [n, k], y [n], mask [n]) -> scalar, under vmap."""

OnPredictions = Callable[["Predictions"], float]


@dataclass(frozen=True)
class Predictions:
    """A site's predictions, as scikit-learn takes them.

    Attributes:
        y: True class codes [n], or targets [n] or, of several, [n, targets].
        probabilities: [n, classes] in float64; for regression empty.
        outputs: The model's outputs for regression, in the shape of `y`.
        classes: The number of classes; 0 for regression.
        positive: The code of the positive class.
    """

    y: NDArray[Any]
    probabilities: Floats
    outputs: Floats
    classes: int
    positive: int = 1

    @property
    def binary(self) -> bool:
        """Whether there are two classes, and one of them is the positive one."""
        return self.classes == 2

    @property
    def predicted(self) -> NDArray[np.int64]:
        """The most probable class of each row [n]."""
        return np.asarray(self.probabilities.argmax(1), dtype=np.int64)


@dataclass(frozen=True)
class RowMetric(Metric):
    """A metric of predictions on rows.

    Attributes:
        regression: Whether it is one of numbers; else of classes.
        on_tensors: What computes it in torch; None for those that scikit-learn computes.
        on_predictions: What computes it from a site's predictions.
    """

    regression: bool = False
    on_tensors: OnTensors | None = field(default=None, compare=False)
    on_predictions: OnPredictions | None = field(default=None, compare=False)


def _brier(outputs: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    # As scikit-learn: of two classes the squared error of the positive one's probability, of more the sum over classes.
    known = mask * (y >= 0)
    own = (y.clamp(min=0).unsqueeze(-1) == torch.arange(outputs.shape[-1], device=y.device)).to(outputs.dtype)
    errors = (outputs.softmax(-1) - own).square().sum(-1) / (2 if outputs.shape[-1] == 2 else 1)
    return masked_mean(errors, known)


def _mae(outputs: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    errors = (outputs.reshape(y.shape) - y).abs()
    return masked_mean(errors if y.dim() == 1 else errors.flatten(1).mean(1), mask)


def _gaussian_nll(outputs: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    # Of errors that are normal with their own variance; of several targets the mean over them.
    errors = (outputs.reshape(y.shape) - y).square().reshape(len(y), -1)
    variance = (errors * mask[:, None]).sum(0) / mask.sum().clamp(min=1)
    return 0.5 * (math.log(2 * math.pi) + variance.clamp(min=torch.finfo(variance.dtype).tiny).log() + 1).mean()


def _by_class(compute: Callable[..., float], prediction: bool) -> OnPredictions:
    """Returns a metric of one class against the rest: of the positive one of two, else the mean over classes present.

    Args:
        compute: (truth [n] of 0 and 1, predicted 0 and 1 or probability [n]) -> value.
        prediction: Whether it takes predicted classes in place of probabilities.
    """

    def value(found: Predictions) -> float:
        codes = [found.positive] if found.binary else np.unique(found.y).tolist()
        values = []
        for code in codes:
            truth = (found.y == code).astype(int)
            own = (found.predicted == code).astype(int) if prediction else found.probabilities[:, code]
            values.append(compute(truth, own))
        return float(np.mean(values)) if values else math.nan

    return value


def _auroc(truth: NDArray[np.int64], probability: Floats) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(truth, probability)) if 0 < truth.sum() < len(truth) else math.nan


def _auprc(truth: NDArray[np.int64], probability: Floats) -> float:
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(truth, probability)) if truth.sum() else math.nan


def _f1(truth: NDArray[np.int64], predicted: NDArray[np.int64]) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(truth, predicted, zero_division=np.nan))


def _recall(truth: NDArray[np.int64], predicted: NDArray[np.int64]) -> float:
    from sklearn.metrics import recall_score

    return float(recall_score(truth, predicted)) if truth.sum() else math.nan


def _specificity(truth: NDArray[np.int64], predicted: NDArray[np.int64]) -> float:
    from sklearn.metrics import recall_score

    return float(recall_score(truth, predicted, pos_label=0)) if truth.sum() < len(truth) else math.nan


def _balanced(found: Predictions) -> float:
    from sklearn.metrics import balanced_accuracy_score

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a predicted class that is not among the true ones
        return float(balanced_accuracy_score(found.y, found.predicted)) if len(found.y) else math.nan


def _r2(found: Predictions) -> float:
    from sklearn.metrics import r2_score

    return float(r2_score(found.y, found.outputs)) if len(found.y) > 1 else math.nan


BUILT_IN: dict[str, RowMetric] = {
    each.name: each
    for each in (
        RowMetric("accuracy", True, "", 0, 1, on_tensors=score),
        RowMetric("ece", False, "", 0, 1, on_tensors=calibration_error),
        RowMetric("brier", False, "", 0, 2, on_tensors=_brier),
        RowMetric("log_loss", False, "", 0, on_tensors=loss),
        RowMetric("balanced_accuracy", True, "", 0, 1, on_predictions=_balanced),
        RowMetric("auroc", True, "", 0, 1, on_predictions=_by_class(_auroc, prediction=False)),
        RowMetric("auprc", True, "", 0, 1, on_predictions=_by_class(_auprc, prediction=False)),
        RowMetric("f1", True, "", 0, 1, on_predictions=_by_class(_f1, prediction=True)),
        RowMetric("sensitivity", True, "", 0, 1, on_predictions=_by_class(_recall, prediction=True)),
        RowMetric("specificity", True, "", 0, 1, on_predictions=_by_class(_specificity, prediction=True)),
        RowMetric("rmse", False, "", 0, regression=True, on_tensors=score),
        RowMetric("mae", False, "", 0, regression=True, on_tensors=_mae),
        RowMetric("nll", False, "", regression=True, on_tensors=_gaussian_nll),
        RowMetric("r2", True, "", -math.inf, 1, regression=True, on_predictions=_r2),
    )
}
"""Every built-in metric on rows by its name."""

DEFAULTS = {False: ("accuracy", "ece"), True: ("rmse", "mae", "r2")}
"""The metrics of classification and of regression where an experiment names none."""


def choose_metrics(names: Sequence[str], score_name: str, *, regression: bool) -> tuple[RowMetric, ...]:
    """Returns the metrics of an experiment, the score first.

    Args:
        names: `evaluation.metrics`: names or import paths; empty for the defaults.
        score_name: `evaluation.score`; empty for the first.
        regression: Whether labels are numbers.

    Raises:
        FedmetaError: There is no such metric, or it is not for such labels.
    """
    chosen = [_metric(name) for name in names or DEFAULTS[regression]]
    if score_name:
        first = _metric(score_name)
        chosen = [first, *(each for each in chosen if each.name != first.name)]
    for each in chosen:
        if each.regression != regression:
            kinds = ("classes", "numbers")
            fitting = ", ".join(name for name, metric in BUILT_IN.items() if metric.regression == regression)
            raise FedmetaError(
                f'[evaluation] metrics: "{each.name}" is for labels that are {kinds[each.regression]}, and these are '
                f"{kinds[regression]} (known: {fitting})"
            )
    return tuple(chosen)


def _metric(name: str) -> RowMetric:
    if name in BUILT_IN:
        return BUILT_IN[name]
    if ":" not in name:
        raise FedmetaError(
            f'[evaluation] metrics: no metric "{name}"{nearest(name, BUILT_IN)} (known: {", ".join(BUILT_IN)})'
        )
    found = load_object(name, "[evaluation] metrics")
    if not isinstance(found, RowMetric) or (found.on_tensors is None) == (found.on_predictions is None):
        raise FedmetaError(
            f'[evaluation] metrics: "{name}" is not a fedmeta.problems.RowMetric with either on_tensors or '
            f"on_predictions"
        )
    return found


def predictions_of(outputs: NDArray[Any], y: NDArray[Any], positive: int) -> Predictions:
    """Returns predictions of a site's outputs [n, classes] (logits) or [n]; rows of unknown classes are left out."""
    if np.issubdtype(y.dtype, np.floating):
        return Predictions(y.astype(np.float64), np.empty((len(y), 0)), outputs.reshape(y.shape).astype(np.float64), 0)
    known = y >= 0
    logits = outputs[known].astype(np.float64)
    shifted = np.exp(logits - logits.max(1, keepdims=True, initial=-math.inf)) if len(logits) else logits
    probabilities = shifted / shifted.sum(1, keepdims=True)
    return Predictions(y[known], probabilities, np.empty(0), outputs.shape[-1], positive)


def in_original_units(
    outputs: Tensor, y: Tensor, mask: Tensor, target: TargetScale, metrics: Sequence[Metric]
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Returns the metrics of a regression that torch computes [sites, steps], in the targets' own units and float64.

    Args:
        outputs: A model's outputs, in standard units [sites, steps, n, targets].
        y: Targets, in standard units [sites, n] or [sites, n, targets].
        mask: 1 for each row [sites, n].
        target: What targets were standardized by.
        metrics: The run's metrics.

    Returns:
        The metrics, and outputs and targets in their own units.
    """
    outputs, y, mask = target.restore(outputs.double()), target.restore(y.double()), mask.double()
    # Padding is 0 and so that of no target; where it is not finite it would make every sum so.
    outputs = torch.where(mask[:, None, :, None] > 0, outputs, 0.0)
    y = torch.where(mask.reshape(*mask.shape, *[1] * (y.dim() - 2)) > 0, y, 0.0)
    found = {}
    for each in metrics:
        if isinstance(each, RowMetric) and each.on_tensors is not None:
            found[each.name] = vmap(vmap(each.on_tensors, (0, None, None)))(outputs, y, mask)
    return found, outputs, y


def on_predictions(metric: RowMetric, found: Predictions) -> float:
    """Returns a metric of a site's predictions; NaN where it is undefined there or predictions are not finite."""
    if not len(found.y) or not np.isfinite(found.probabilities if found.classes else found.outputs).all():
        return math.nan
    assert metric.on_predictions is not None
    return metric.on_predictions(found)
