"""What a checkpoint keeps of a run in progress, and what a resumed run takes from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fedmeta.checkpoint import Checkpoint, Evaluation
from server.cohorts import Cohorts
from server.federation import Federation
from server.run_log import RunLogger
from server.run_state import RunState
from server.steering import Steering

COHORTS, DOWNLINK = "cohorts/", "downlink/"
"""How names begin in the checkpoint's memory: of what the server remembers of sites, and of the state they have."""


def checkpoint_of(
    federation: Federation,
    state: RunState,
    steering: Steering,
    logger: RunLogger,
    *,
    under_way: tuple[Mapping[str, Any], Mapping[str, Tensor]],
    round_number: int,
    took_part: Mapping[str, int],
    evaluations: Sequence[Evaluation],
    totals: Mapping[str, float],
    alarms: Sequence[Mapping[str, Any]],
    finished: bool,
) -> Checkpoint:
    """Returns a run as it stands.

    Args:
        federation: The sites.
        state: The meta-state, and what is remembered from round to round.
        steering: What the run decided about itself.
        logger: The tracked run.
        under_way: What `server.lateness.Lateness.state` returns; two empty ones without a quorum.
        round_number: The last finished round.
        took_part: In how many rounds each site took part.
        evaluations: The evaluations so far.
        totals: Seconds, bytes and failures so far.
        alarms: The alarms of sites in a stream so far: site, step and row.
        finished: Whether the last evaluation is done.
    """
    lateness, late = under_way
    cohorts = {} if state.cohorts.plain else {"cohorts": state.cohorts.to_json()}
    return Checkpoint(
        lateness=dict(lateness),
        late=dict(late),
        experiment=state.experiment.to_toml(),
        run_id=logger.run_id,
        round_number=round_number,
        meta_state=state.meta_state,
        optimizer=state.optimizer.state(),
        classes=federation.classes,
        names=federation.names,
        new_sites=federation.new_sites,
        validation_sites=federation.validation_sites,
        features=federation.features,
        shape=federation.shape,
        train_rows=tuple(federation.train_rows.tolist()),
        test_rows=tuple(federation.test_rows.tolist()),
        regression=federation.regression,
        targets=federation.targets,
        categories=federation.categories,
        tokens=federation.tokens,
        weights=tuple(federation.weights.tolist()),
        form=federation.form,
        held_out=federation.held_out,
        norms=state.norms,
        took_part=tuple(took_part[name] for name in federation.names),
        evaluations=tuple(evaluations),
        totals=dict(totals),
        engine=state.engine,
        budget=state.budget,
        metrics=logger.metrics,
        schedule=logger.schedule,
        steering=steering.to_json() | cohorts | ({"alarms": list(alarms)} if alarms else {}),
        memory=steering.memory
        | {COHORTS + name: value for name, value in state.cohorts.tensors.items()}
        | {DOWNLINK + name: value for name, value in (state.downlink.state if state.downlink else {}).items()},
        finished=finished,
    )


def restore_state(state: RunState, earlier: Checkpoint) -> None:
    """Puts in place what a checkpoint remembers from round to round, beside the meta-state and the optimizer."""
    state.engine, state.budget, state.norms = earlier.engine, earlier.budget, earlier.norms
    if state.downlink:
        kept = {name.removeprefix(DOWNLINK): own for name, own in earlier.memory.items() if name.startswith(DOWNLINK)}
        state.downlink.state, state.downlink.number = kept, earlier.round_number if kept else 0
    tensors = {name.removeprefix(COHORTS): own for name, own in earlier.memory.items() if name.startswith(COHORTS)}
    state.cohorts = Cohorts.of(state.experiment, earlier.steering.get("cohorts", {}), tensors)
