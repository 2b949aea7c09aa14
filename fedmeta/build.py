"""From an experiment to its learner."""

from __future__ import annotations

import torch
from torch import nn

from fedmeta import models
from fedmeta.data import Population
from fedmeta.errors import FedmetaError
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


def smoke_test(experiment: Experiment, population: Population) -> None:
    """Runs an experiment's model on rows of a population's form (`validated_learner`)."""
    outputs = len(population.class_names) or 1
    kind = {"tokens": population.tokens, "regression": population.regression}
    validated_learner(experiment, tuple(population.shape), outputs, **kind)


def validated_learner(
    experiment: Experiment, shape: tuple[int, ...], outputs: int, *, tokens: bool, regression: bool
) -> Learner:
    """Builds the learner, and runs its model on two rows of zeros, to refuse what cannot work before a file exists.

    Args:
        experiment: The run's description.
        shape: The shape of one row.
        outputs: The number of classes, or 1 for regression.
        tokens: Whether rows are codes of symbols.
        regression: Whether labels are numbers.

    Raises:
        FedmetaError: The learner or the model cannot be built, or the model does not take such rows or returns
            something else than outputs for each.
    """
    learner, name = learner_of(experiment, shape, outputs), experiment.model.name
    if name == "char_lstm" and not tokens:
        raise FedmetaError(
            '[model] name = "char_lstm" needs rows of symbol codes, as data.source = "shakespeare" has them'
        )
    parameters: models.Parameters = dict(learner.network.module.named_parameters())
    rows = torch.zeros(2, *shape, dtype=torch.int64 if tokens else torch.float32)
    try:
        with torch.no_grad():
            found = learner.predict(parameters, rows)
    except FedmetaError:
        raise
    except Exception as error:  # whatever a user's own code raises
        raise FedmetaError(f'[model] name = "{name}" failed on rows of shape {shape}: {error}') from error
    fits = found.numel() == 2 if regression else found.dim() == 2 and len(found) == 2 and found.shape[1] >= outputs
    if not fits:
        raise FedmetaError(
            f'[model] name = "{name}" returned outputs of shape {tuple(found.shape)} for 2 rows: make it (2, {outputs})'
        )
    return learner
