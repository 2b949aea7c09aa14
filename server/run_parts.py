"""What a run is made of: its sites, learner, optimizer, strategy and records; from the start or from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from fedmeta import checkpoint as checkpoints
from fedmeta.build import validated_learner
from fedmeta.checkpoint import Checkpoint
from fedmeta.data import subgroups
from fedmeta.experiment import Experiment
from fedmeta.learners import FROZEN, Learner
from server import aggregation, cohorts, compression, secure_sum, stream
from server.federation import remap_site_indices
from server.lateness import Lateness
from server.lateness import check as check_lateness
from server.membership import Membership
from server.optimizer import ServerOptimizer
from server.privacy import SiteLevelDP, make_dp_mechanism
from server.run_checkpoint import restore_state
from server.run_log import RunLogger
from server.site_statistics import ask_categories, ask_standardisation
from server.steering import Steering
from server.strategy import MetaGradientStrategy
from server.warm_start import warm_start


@dataclass(frozen=True)
class RunParts:
    """What a run is made of, before its first round or its next one.

    Attributes:
        membership: The sites, with notes of what is reported at the start.
        learner: The learner, tried on the sites' form of rows.
        strategy: A round, with the meta-state.
        steering: What the run decides about itself.
        lateness: What is known of late replies; None where every round waits for all.
        privacy: Noise and its account; None without `[privacy]`.
        logger: The run's folder and its tracked run.
        without_sums: The sites without a part in the sums of features, with the reasons.
        started_from: The earlier run whose meta-state the run starts from; empty without one.
        earlier: The checkpoint that the run resumes from, its evaluations by the federation's numbers of sites.
    """

    membership: Membership
    learner: Learner
    strategy: MetaGradientStrategy
    steering: Steering
    lateness: Lateness | None
    privacy: SiteLevelDP | None
    logger: RunLogger
    without_sums: Mapping[str, str]
    started_from: Mapping[str, Any]
    earlier: Checkpoint | None


def assemble(grid: Grid, experiment: Experiment, folder: Path, earlier: Checkpoint | None) -> RunParts:
    """Finds the sites and makes what a run is made of.

    Args:
        grid: Flower's grid.
        experiment: The run's description.
        folder: The run's folder.
        earlier: The checkpoint to resume from; None for a run from the start.

    Raises:
        FedmetaError: Too few sites are there, or settings do not go with them, the learner or one another.
    """
    membership = Membership(grid, experiment, earlier)
    membership.federation, without_sums = ask_categories(grid, membership.federation, experiment)
    federation, server = membership.federation, experiment.server
    training = len(federation.training)
    subgroups.check(experiment, federation.features, federation.categories)
    if earlier:
        moved = remap_site_indices(earlier.evaluations, earlier.names, federation)
        earlier = replace(earlier, evaluations=tuple(moved), names=federation.names)
    learner = validated_learner(
        experiment, federation.row_shape, federation.classes, len(federation.targets), tokens=federation.tokens
    )
    start = dict(earlier.meta_state) if earlier else dict(learner.init(experiment.runtime.seed))
    started_from: dict[str, Any] = {}
    if experiment.model.start and not earlier:
        start, started_from, notes = warm_start(experiment, start, federation)
        membership.notes += notes
    constants = {name: start.pop(name) for name in list(start) if name.startswith(("standardisation.", FROZEN))}
    round_number = earlier.round_number if earlier else 0
    aggregation.check(server, training)
    if server.compression_down != "none":
        compression.check_down(experiment, learner)
    if server.compression != "none":
        membership.notes += compression.check(experiment, learner)
    lateness: Lateness | None = None
    if server.quorum != 1.0 or server.late == "buffer" or server.deadline:
        membership.notes += check_lateness(experiment, grid)
        lateness = Lateness(experiment, *((earlier.lateness, earlier.late) if earlier else ({}, {})))
        if earlier and hasattr(grid, "clock"):
            grid.clock, grid.alarms = lateness.clock, lateness.arrivals  # type: ignore[attr-defined]
    if experiment.privacy.secure_aggregation:
        membership.notes += secure_sum.check(experiment, training)
    privacy = make_dp_mechanism(experiment, learner, start, training, folder, round_number)
    cohorts.check(experiment, learner, start, training)
    membership.notes += stream.check(experiment, learner, federation)
    optimizer = ServerOptimizer(server, learner.update, start, learner.averaged)
    if earlier:
        optimizer.restore(start, earlier.optimizer)
    else:
        scale, without_features = ask_standardisation(grid, federation, experiment, membership.notes)
        without_sums = without_sums | without_features
        constants |= scale
    strategy = MetaGradientStrategy(experiment, federation, optimizer, constants, folder.name, privacy, learner=learner)
    strategy.saved_rounds = checkpoints.rounds(folder, round_number)
    if earlier:
        restore_state(strategy, earlier)
    return RunParts(
        membership,
        learner,
        strategy,
        Steering(experiment, learner, strategy, earlier),
        lateness,
        privacy,
        RunLogger(experiment, folder, earlier, learner.problem.metrics),
        without_sums,
        started_from,
        earlier,
    )
