"""Supervised learning on rows: a torch model, cross-entropy for classes and squared error for numbers.

A loss on the same rows is a subclass that overrides `inner` (and `outer`, where it differs); it is named by its import
path as [problem] name and is given the run's model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedmeta.models.functional import FunctionalModel
from fedmeta.problems.metric import Metric
from fedmeta.problems.problem import Data, Parameters, Problem
from fedmeta.problems.row_metrics import DEFAULTS, RowMetric, choose_metrics
from fedmeta.problems.rows import concatenate, loss
from fedmeta.task import Rows, rows_mask

OUTPUTS = "outputs"
"""The entry of an evaluation that holds the model's outputs [rows, outputs] and is no figure."""


class Supervised(Problem):
    """A model on rows (x, y) or (x, y, mask).

    Args:
        model: A torch module, or a function that makes one (called again under the seed by `init`).
        metrics: What sites are scored by, the score first; None for accuracy and ece, or rmse, mae and r2.
        positive: The code of the class that one-sided metrics are about.
        with_outputs: Whether evaluations hold the model's outputs, for metrics that scikit-learn computes.
    """

    on_rows: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module] | FunctionalModel,
        metrics: Sequence[Metric] | None = None,
        *,
        positive: int = 1,
        with_outputs: bool = False,
    ) -> None:
        self.network = model if isinstance(model, FunctionalModel) else FunctionalModel(model)
        self.chosen = None if metrics is None else tuple(metrics)
        self.metrics = self.chosen or choose_metrics(DEFAULTS[False], "", regression=False)
        self.positive = positive
        self.with_outputs = with_outputs
        self.frozen = self.network.frozen

    def init(self, seed: int) -> Parameters:
        """Returns the model's initial parameters, frozen ones and buffers included."""
        return self.network.init(seed)

    @cached_property
    def layout(self) -> dict[str, torch.Size]:
        """The shape of each parameter, known from the model without a draw."""
        return self.network.shapes

    def predict(self, parameters: Parameters, x: Tensor) -> Tensor:
        """Returns outputs [n, outputs] (logits, or predictions for regression) for inputs [n, *shape]."""
        return self.network(parameters, x)

    def inner(self, parameters: Parameters, data: Data) -> Tensor:
        """Returns the mean loss on rows: cross-entropy, or mean squared error for floating-point y."""
        return loss(self.predict(parameters, data[0]), data[1], rows_mask(data))

    def all_data(self, parameters: Parameters, support: Data, query: Data) -> Tensor:
        """Returns the mean loss over all rows of a task."""
        return self.inner(parameters, all_rows(support, query))

    def evaluate(self, parameters: Parameters, data: Data) -> dict[str, Tensor]:
        """Returns the metrics that torch computes, and the outputs where others need them."""
        outputs = self.predict(parameters, data[0])
        found = self.figures(outputs, data[1], rows_mask(data))
        return {"loss": loss(outputs, data[1], rows_mask(data)), **found} if self.plain else found

    def figures(self, outputs: Tensor, y: Tensor, mask: Tensor, known: Collection[str] = ()) -> dict[str, Tensor]:
        """Returns the metrics of outputs [n, outputs] that torch computes, but for `known` ones; and the outputs."""
        chosen = [each for each in self.metrics_for(y) if each.name not in known]
        found = {each.name: each.on_tensors(outputs, y, mask) for each in chosen if each.on_tensors}
        return {**found, OUTPUTS: outputs} if self.with_outputs else found

    def metrics_for(self, y: Tensor) -> tuple[RowMetric, ...]:
        """Returns the metrics of labels: those that were chosen, else the defaults for their kind."""
        if self.chosen is not None:
            return tuple(each for each in self.chosen if isinstance(each, RowMetric))
        return choose_metrics((), "", regression=y.is_floating_point())

    @cached_property
    def plain(self) -> bool:
        """Whether the objectives are those of this class, which the low-rank engine knows."""
        kind = type(self)
        names = ("inner", "outer", "all_data", "constrain", "predict")
        base = {"outer": Problem.outer, "constrain": Problem.constrain}
        same = all(getattr(kind, name) is base.get(name, getattr(Supervised, name)) for name in names)
        from fedmeta.problems.solvers import descent

        return same and self.solver == descent and not self.shared


def all_rows(support: Rows, query: Rows) -> Rows:
    """Returns support and query rows as one (x, y, mask)."""
    parts = ((rows[0], rows[1], rows_mask(rows)) for rows in (support, query))
    return concatenate(*parts)
