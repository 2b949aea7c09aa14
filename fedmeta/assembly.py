"""From an experiment to its learner."""

from __future__ import annotations

import torch
from torch import nn

from fedmeta import models
from fedmeta.experiment import Experiment
from fedmeta.learners import Learner, build, learner_class, settings_of

AUTOMATIC = {"gradient": ("adam", 0.003), "displacement": ("sgd", 1.0), "nothing": ("sgd", 1.0)}
"""The server's optimizer and learning rate by what a learner's sites send, where the experiment says "auto"."""


def learner_of(experiment: Experiment, shape: tuple[int, ...], outputs: int) -> Learner:
    """Builds the learner and the model that an experiment describes.

    Args:
        experiment: The run's description.
        shape: The shape of one row.
        outputs: The number of classes, or 1 for regression.

    Raises:
        FedmetaError: The learner or the model cannot be built from these settings for such rows.
    """
    section = experiment.learner
    own = settings_of(learner_class(section.name))
    settings = {key: value for key, value in section.model_dump(exclude={"name"}).items() if key in own}

    def model() -> nn.Module:
        section = experiment.model
        keys = dict(section.extra) if ":" in section.name else section.model_dump(exclude={"name", "dtype"})
        dtype = torch.float64 if section.dtype == "float64" else torch.float32
        return models.build(section.name, shape, outputs, **keys).to(dtype)

    return build(section.name, model, **{**settings, **section.extra})
