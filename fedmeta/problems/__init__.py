"""What sites solve: problems, their metrics and solvers, and who holds which task."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmeta.problems.implicit_function import implicit
    from fedmeta.problems.metric import Metric, metric_of
    from fedmeta.problems.problem import Data, Parameters, Problem, has_payload
    from fedmeta.problems.row_metrics import BUILT_IN, Predictions, RowMetric, choose_metrics
    from fedmeta.problems.solvers import (
        Adam,
        Clipped,
        ClosedForm,
        CrossEntropy,
        Descent,
        GaussianProcessSearch,
        Momentum,
        OptimalityCriteria,
        Solver,
        ascent,
        descent,
    )
    from fedmeta.problems.source import TaskSource
    from fedmeta.problems.supervised import Supervised

_HOMES = {
    "implicit_function": ("implicit",),
    "metric": ("Metric", "metric_of"),
    "problem": ("Data", "Parameters", "Problem", "has_payload"),
    "row_metrics": ("BUILT_IN", "Predictions", "RowMetric", "choose_metrics"),
    "solvers": (
        "Adam", "Clipped", "ClosedForm", "CrossEntropy", "Descent", "GaussianProcessSearch", "Momentum",
        "OptimalityCriteria", "Solver", "ascent", "descent",
    ),
    "source": ("TaskSource",),
    "supervised": ("Supervised",),
}  # fmt: skip

__all__ = [
    "BUILT_IN",
    "Adam",
    "Clipped",
    "ClosedForm",
    "CrossEntropy",
    "Data",
    "Descent",
    "GaussianProcessSearch",
    "Metric",
    "Momentum",
    "OptimalityCriteria",
    "Parameters",
    "Predictions",
    "Problem",
    "RowMetric",
    "Solver",
    "Supervised",
    "TaskSource",
    "ascent",
    "choose_metrics",
    "descent",
    "has_payload",
    "implicit",
    "metric_of",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: what only reads a metric's name need not import torch."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"fedmeta.problems.{module}"), name)
    raise AttributeError(f"module 'fedmeta.problems' has no attribute {name!r}")
