"""Checks an experiment on tasks of a few of its sites, before a run and by `fedmeta check`."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np

from clients.app import app
from clients.node import RowNode, learner_for, node_of
from fedmeta.build import smoke_test
from fedmeta.data import order_classes, standardisation, target_scale
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.learners.check import MOST_PARAMETERS, Checked, check
from fedmeta.models import load_weights
from fedmeta.problems import Problem, Supervised
from fedmeta.runtime.local import LocalGrid

SITES = 4

SHOWN = 5
"""How many names a note lists."""


def check_experiment(experiment: Experiment) -> Checked:
    """Checks an experiment's learner on the tasks of a few sites (`fedmeta.learners.check`).

    Raises:
        FedmetaError: Something does not hold; the message names it.
    """
    experiment = experiment.absolute()
    node = node_of(LocalGrid(app, experiment).context)
    if isinstance(node, RowNode):
        node = node.with_categories(node.categories(node.hosted, node.categorical) if node.categorical else ())
    sites = np.unique(np.linspace(0, len(node.hosted) - 1, SITES).astype(np.int64))
    classes = order_classes(node.classes()) if isinstance(node, RowNode) else ()
    here, learner = node.hosted[sites], learner_for(node, classes)
    target = target_scale(node.target_sums(here), experiment.target_kind)
    scale = replace(standardisation(node.sums(here)), target=target)
    batch = node.training_batch(here, 1, scale, classes, learner.minibatches)
    tasks = [batch.task(site) for site in range(batch.sites)]
    straight_through = experiment.runtime.check == "straight-through"
    return check(learner, tasks, experiment.runtime.seed, straight_through)


def check_own_code(experiment: Experiment) -> list[str]:
    """Checks an experiment that names own code or weights, once before its run; returns notes on what was not verified.

    Raises:
        FedmetaError: Something does not hold; the message names it.
    """
    names = (experiment.problem.name, experiment.model.name, experiment.learner.name)
    own = [name for name in names if ":" in name]
    if not own and not experiment.model.weights:
        return []
    problem = smoke_test(experiment).problem
    notes = weights_notes(experiment, problem)
    return notes + _check_named(experiment, own, problem) if own else notes


def weights_notes(experiment: Experiment, problem: Problem) -> list[str]:
    """Returns what a run's first parameters are read from, and which are drawn."""
    path = experiment.model.weights
    if not path:
        return []
    if not isinstance(problem, Supervised):
        raise FedmetaError(f'[model] weights = "{path}": an own problem has no [model]; let its init read the file')
    loaded, drawn = load_weights(copy.deepcopy(problem.network.module), path)
    rest = f"; drawn by the seed: {', '.join(drawn[:SHOWN])}{' ...' * (len(drawn) > SHOWN)}" if drawn else ""
    return [f"starts from {len(loaded)} tensors of {path}{rest}"]


def _check_named(experiment: Experiment, own: list[str], problem: Problem) -> list[str]:
    if experiment.runtime.check == "off":
        return [f'not checked, as runtime.check = "off" asks: {", ".join(own)}']
    size = sum(shape.numel() for shape in problem.layout.values())
    if size > MOST_PARAMETERS:
        return [f"not checked, for it has {size:,} parameters: {', '.join(own)}; fedmeta check does"]
    return [f"not verified: {line}" for line in check_experiment(experiment).skipped]
