"""Federated meta-learning: a start from which every site, also a new one, adapts in a few steps.

import fedmeta

experiment = fedmeta.load_experiment("experiments/digits.toml", ["server.rounds=50"])
result = fedmeta.run(experiment)
result.summary, result.sites, result.meta_state
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmeta import engines, learners
    from fedmeta.experiment import Experiment, load_experiment
    from fedmeta.runtime import Result, run
    from fedmeta.task import Task

__all__ = ["Experiment", "Result", "Task", "cohort", "learners", "load_experiment", "run"]
__version__ = "0.1.0"

# Torch's threads wait for one another by spinning, which on a busy machine makes two of them much slower than
# one. This many turns are some microseconds; after that they sleep. Heeded if torch is imported later.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

_HOMES = {
    "Experiment": "fedmeta.experiment",
    "load_experiment": "fedmeta.experiment",
    "Result": "fedmeta.runtime",
    "run": "fedmeta.runtime",
    "Task": "fedmeta.task",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: a client need not load what only the server needs."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in __all__:
        return import_module(f"fedmeta.{name}")
    raise AttributeError(f"module 'fedmeta' has no attribute {name!r}")
