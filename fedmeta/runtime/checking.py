"""Checks an experiment on tasks of a few of its sites, before a run and by `fedmeta check`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from clients.app import app
from clients.node import RowNode, learner_for, node_of
from fedmeta.build import smoke_test
from fedmeta.data import order_classes, standardisation, target_scale
from fedmeta.experiment import Experiment
from fedmeta.learners.check import MOST_PARAMETERS, Checked, check
from fedmeta.runtime.local import LocalGrid

SITES = 4


def check_experiment(experiment: Experiment) -> Checked:
    """Checks an experiment's learner on the tasks of a few sites (`fedmeta.learners.check`).

    Raises:
        FedmetaError: Something does not hold; says what.
    """
    experiment = experiment.absolute()
    node = node_of(LocalGrid(app, experiment).context)
    sites = np.unique(np.linspace(0, len(node.hosted) - 1, SITES).astype(np.int64))
    classes = order_classes(node.classes()) if isinstance(node, RowNode) else ()
    here = node.hosted[sites]
    target = target_scale(node.target_sums(here), experiment.target_kind)
    scale = replace(standardisation(node.sums(here)), target=target)
    batch = node.training_batch(here, 1, scale, classes)
    tasks = [batch.task(site) for site in range(batch.sites)]
    straight_through = experiment.runtime.check == "straight-through"
    return check(learner_for(node, classes), tasks, experiment.runtime.seed, straight_through)


def check_own_code(experiment: Experiment) -> list[str]:
    """Checks an experiment that names own code, once before its run; returns notes on what was not verified.

    Raises:
        FedmetaError: Something does not hold; says what.
    """
    names = (experiment.problem.name, experiment.model.name, experiment.learner.name)
    own = [name for name in names if ":" in name]
    if not own:
        return []
    if experiment.runtime.check == "off":
        return [f'not checked, as runtime.check = "off" asks: {", ".join(own)}']
    problem = smoke_test(experiment).problem
    size = sum(shape.numel() for shape in problem.layout.values())
    if size > MOST_PARAMETERS:
        return [f"not checked, for it has {size:,} parameters: {', '.join(own)}; fedmeta check does"]
    return [f"not verified: {line}" for line in check_experiment(experiment).skipped]
