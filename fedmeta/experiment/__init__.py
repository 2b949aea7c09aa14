"""One typed, validated description of a run: a TOML file, Flower's one run-config key and MLflow's flat params."""

from fedmeta.experiment.data import ROW_ORDER, SOURCES, Data
from fedmeta.experiment.files import Experiment, Key, describe, load_experiment
from fedmeta.experiment.sections import (
    LEARNERS,
    MODELS,
    UNTRACKED,
    Evaluation,
    Hessian,
    Learner,
    Model,
    Norm,
    Privacy,
    Problem,
    Runtime,
    Server,
    Stream,
    Tracking,
)
from fedmeta.experiment.tracking_uri import default_uri, with_user_info, without_user_info
from fedmeta.experiment.validation import Scalar

__all__ = [
    "LEARNERS",
    "MODELS",
    "ROW_ORDER",
    "SOURCES",
    "UNTRACKED",
    "Data",
    "Evaluation",
    "Experiment",
    "Hessian",
    "Key",
    "Learner",
    "Model",
    "Norm",
    "Privacy",
    "Problem",
    "Runtime",
    "Scalar",
    "Server",
    "Stream",
    "Tracking",
    "default_uri",
    "describe",
    "load_experiment",
    "with_user_info",
    "without_user_info",
]
