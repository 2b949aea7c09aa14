"""What sites solve: problems, their metrics and solvers, and who holds which task."""

from fedmeta.problems.metric import Metric, metric_of
from fedmeta.problems.problem import Data, Parameters, Problem, has_payload
from fedmeta.problems.row_metrics import BUILT_IN, Predictions, RowMetric, choose_metrics
from fedmeta.problems.solvers import (
    Adam,
    Clipped,
    ClosedForm,
    CrossEntropy,
    Descent,
    Momentum,
    Solver,
    ascent,
    descent,
    implicit,
)
from fedmeta.problems.source import TaskSource
from fedmeta.problems.supervised import Supervised

__all__ = [
    "BUILT_IN",
    "Adam",
    "Clipped",
    "ClosedForm",
    "CrossEntropy",
    "Data",
    "Descent",
    "Metric",
    "Momentum",
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
