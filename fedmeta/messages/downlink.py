"""A request for training that holds what changed in the meta-state since the one that a node has, in fewer bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

from fedmeta.compression import Arrays, unpack
from fedmeta.learners import FROZEN
from fedmeta.messages.records import MessageError, read_arrays, read_record, read_scalar, write_arrays

BASE, CHANGES, STATE = "base", "changes", "meta_state"
"""The records of which state a message changes, of the changes, and of a whole state."""


def trained(names: Iterable[str]) -> list[str]:
    """Returns which entries of a meta-state change in training, in order."""
    return sorted(name for name in names if not name.startswith(("standardisation.", FROZEN)))


def flat(state: Mapping[str, Tensor]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Returns what is trained of a meta-state as one vector."""
    return np.concatenate([state[name].detach().double().cpu().numpy().ravel() for name in trained(state)])


def changed(state: Mapping[str, Tensor], arrays: Arrays, method: str, keep: float) -> dict[str, Tensor]:
    """Returns a meta-state after a packed change. Server and sites compute the same bits.

    Raises:
        PackedError: The arrays are none.
    """
    before = flat(state)
    after = torch.from_numpy(before + unpack(arrays, method, keep, 1, len(before))[0])
    names = trained(state)
    parts = torch.split(after, [state[name].numel() for name in names])
    own = {name: part.reshape(state[name].shape).to(state[name]) for name, part in zip(names, parts, strict=True)}
    return {**state, **own}


def with_whole(content: RecordDict) -> RecordDict:
    """Returns a request with a whole meta-state, which the node is to keep."""
    return RecordDict({**content, BASE: ConfigRecord({"round": 0})})


def with_changes(content: RecordDict, base: int, changes: Mapping[int, Arrays]) -> RecordDict:
    """Returns a request with changes in place of its meta-state.

    Args:
        content: The request, with an empty meta-state.
        base: The round whose state the node has.
        changes: The packed change of each later round up to the request's.
    """
    arrays = {f"{number}/{name}": value for number, own in changes.items() for name, value in own.items()}
    packed = write_arrays({name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()})
    return RecordDict({**content, CHANGES: packed, BASE: ConfigRecord({"round": base})})


def taken_apart(content: RecordDict) -> tuple[int, dict[int, Arrays], RecordDict]:
    """Returns the round whose state a request changes (0: its state is whole), the changes by round, and the rest.

    Raises:
        MessageError: It is no such request.
    """
    if BASE not in content or "task" not in content:
        raise MessageError("it does not name the state that it changes")
    base = read_scalar(read_record(content, BASE, ConfigRecord, "round"), "round", int)
    changes: dict[int, Arrays] = {}
    if base:
        if CHANGES not in content:
            raise MessageError("it has no changes")
        for name, value in read_arrays(content, CHANGES).items():
            number, _, key = name.partition("/")
            if not number.isdecimal():
                raise MessageError(f'"{name}" is no change of a round')
            changes.setdefault(int(number), {})[key] = value.numpy()
    rest = {name: record for name, record in content.items() if name not in (BASE, CHANGES)}
    return base, changes, RecordDict(rest)
