"""What compression, of replies and of what goes down, does not go with."""

from __future__ import annotations

from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.learners import Learner
from fedmeta.problems.problem import has_outer_step


def check_down(experiment: Experiment, learner: Learner) -> None:
    """Checks that changes of the meta-state may be rounded.

    Raises:
        FedmetaError: They may not.
    """
    if has_outer_step(learner.problem):
        raise FedmetaError(
            f'[server] compression_down = "{experiment.server.compression_down}": must be "none" with a problem that '
            "makes its own step: a rounded state may be none"
        )


def check(experiment: Experiment, learner: Learner) -> list[str]:
    """Checks that compression and the rest of an experiment make sense together; returns what a run should report.

    Raises:
        FedmetaError: They do not.
    """
    server, privacy = experiment.server, experiment.privacy
    rules = (
        (privacy.secure_aggregation, "privacy.secure_aggregation", "a ring adds whole numbers, and rounds them itself"),
        (
            bool(privacy.noise_multiplier),
            "privacy.noise_multiplier above 0",
            "what was left out and is sent later is beyond clip_norm",
        ),
        (
            has_outer_step(learner.problem),
            "a problem that makes its own step of what sites send",
            "its statistics are no gradient, and rounding may make them impossible",
        ),
    )
    for broken, other, reason in rules:
        if broken:
            raise FedmetaError(f'[server] compression = "{server.compression}": must be "none" with {other}: {reason}')
    if (server.late == "buffer" or server.quorum != 1.0) and experiment.runtime.delay:
        return ["server.compression: replies that are under way are not kept in checkpoints, and are lost by a resume"]
    return []
