"""One typed, validated description of a run: a TOML file, Flower's one run-config key and MLflow's flat params."""

from fedmeta.experiment.data import SOURCES, Data
from fedmeta.experiment.files import Experiment, Key, describe, load_experiment
from fedmeta.experiment.sections import (
    LEARNERS,
    MODELS,
    UNTRACKED,
    Evaluation,
    Learner,
    Model,
    Privacy,
    Problem,
    Runtime,
    Server,
    Tracking,
)
from fedmeta.experiment.values import Scalar

__all__ = [
    "LEARNERS",
    "MODELS",
    "SOURCES",
    "UNTRACKED",
    "Data",
    "Evaluation",
    "Experiment",
    "Key",
    "Learner",
    "Model",
    "Privacy",
    "Problem",
    "Runtime",
    "Scalar",
    "Server",
    "Tracking",
    "describe",
    "load_experiment",
]
