"""Federated meta-learning: a start from which every site, also a new one, adapts in a few steps.

import fedmeta

experiment = fedmeta.load_experiment("experiments/digits.toml", ["server.rounds=50"])
result = fedmeta.run(experiment)
result.summary, result.sites, result.meta_state
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedmeta.versions import __version__

if TYPE_CHECKING:
    from fedmeta import engines, learners, noise, problems
    from fedmeta.adapt.classifier import PersonalizedClassifier
    from fedmeta.engines import meta_gradients
    from fedmeta.experiment import Experiment, load_experiment
    from fedmeta.noise import noise_key
    from fedmeta.problems import Metric, Problem, Solver, TaskSource, implicit
    from fedmeta.runtime import Result, run
    from fedmeta.task import Task, rows_mask

__all__ = [
    "Experiment",
    "Metric",
    "PersonalizedClassifier",
    "Problem",
    "Result",
    "Solver",
    "Task",
    "TaskSource",
    "__version__",
    "engines",
    "implicit",
    "learners",
    "load_experiment",
    "meta_gradients",
    "noise",
    "noise_key",
    "problems",
    "rows_mask",
    "run",
]

_HOMES = {
    "Experiment": "fedmeta.experiment",
    "load_experiment": "fedmeta.experiment",
    "meta_gradients": "fedmeta.engines",
    "noise_key": "fedmeta.noise",
    "Metric": "fedmeta.problems",
    "Problem": "fedmeta.problems",
    "Solver": "fedmeta.problems",
    "TaskSource": "fedmeta.problems",
    "implicit": "fedmeta.problems",
    "PersonalizedClassifier": "fedmeta.adapt.classifier",
    "Result": "fedmeta.runtime",
    "run": "fedmeta.runtime",
    "Task": "fedmeta.task",
    "rows_mask": "fedmeta.task",
}


def __dir__() -> list[str]:
    """Returns the public names, those not yet imported included."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: a client need not load what only the server needs."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in __all__:
        return import_module(f"fedmeta.{name}")
    raise AttributeError(f"module 'fedmeta' has no attribute {name!r}")
