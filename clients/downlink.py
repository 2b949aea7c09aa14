"""A node's side of small messages down: it keeps the last state that it adapted from, and applies what changed."""

from __future__ import annotations

from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict

from fedmeta.compression import Arrays, PackedError
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.messages import MessageError, write_arrays
from fedmeta.messages.downlink import STATE, changed, taken_apart
from fedmeta.messages.records import read_arrays, read_record, read_scalar

KEPT, ROUND = "downlink", "downlink_round"
"""The records in a node's memory that hold the state, and the round that it is of."""


class NoStateError(FedmetaError):
    """A message changes a state that the node does not have."""


def with_state(content: RecordDict, context: Context, experiment: Experiment) -> RecordDict:
    """Returns a request for training with its whole meta-state, and keeps that in the node's memory.

    Raises:
        MessageError: The request is none.
        NoStateError: The node has been restarted, or has missed a round.
    """
    base, changes, rest = taken_apart(content)
    number = read_scalar(read_record(rest, "task", ConfigRecord), "round", int)
    if base:
        rest[STATE] = _state(context, experiment, base, number, changes)
    context.state[KEPT] = rest[STATE]
    context.state[ROUND] = ConfigRecord({"round": number})
    return rest


def _state(context: Context, experiment: Experiment, base: int, number: int, changes: dict[int, Arrays]) -> ArrayRecord:
    record, kept = context.state.get(ROUND), context.state.get(KEPT)
    have = record["round"] if isinstance(record, ConfigRecord) else 0
    if not isinstance(kept, ArrayRecord) or not isinstance(have, int):
        raise NoStateError(f"the message changes the state of round {base}, and the node has none")
    if not base <= have <= number:
        raise NoStateError(f"the message changes the state of round {base}, and the node has that of round {have}")
    if have == number:  # another message of the same round brought it
        return kept
    state = read_arrays(RecordDict({STATE: kept}), STATE)
    server = experiment.server
    for step in range(have + 1, number + 1):
        if step not in changes:
            raise MessageError(f"the change of round {step} is missing")
        try:
            state = changed(state, changes[step], server.compression_down, server.compression_keep)
        except PackedError as error:
            raise MessageError(f"the change of round {step}: {error}") from None
    return write_arrays(state)
