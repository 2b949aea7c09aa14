"""A node's sites in a stream: their rows at the step that a request is about, and the alarm that each site keeps.

With `stream.memory = "alarm"` a site watches the losses of the rows of its blocks, by a model that had not seen them.
When the alarm goes off it forgets the rows before the change. What it needs for that (losses of rows) stays in the
site's own folder, by round, as `clients.local_state` keeps personal parameters; the row of an alarm leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from flwr.app import Context
from numpy.typing import NDArray
from torch import Tensor

from clients.local_state import LocalStateStore, write
from clients.node import Node, RowNode
from fedmeta.data.stream_split import StreamSplit, step_of
from fedmeta.messages import RoundRequest
from fedmeta.randomness import draws, site_keys
from fedmeta.stream.alarm import watch

Floats = NDArray[np.float64]

FOLDER = "stream"
"""Beside the folders of what sites keep of a learner's."""


@dataclass(frozen=True)
class Memory:
    """What one site keeps of its stream.

    Attributes:
        losses: Of the rows that are watched, those since the last alarm [rows].
        heard: The place of the first of them.
        since: The first row that is remembered.
        starts: The first row that was remembered at each step so far [steps].
        alarms: How often the alarm has gone off.
    """

    losses: Floats
    heard: int
    since: int = 0
    starts: tuple[int, ...] = ()
    alarms: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """Returns it as a file holds it."""
        return {
            "losses": torch.from_numpy(self.losses.copy()),
            "numbers": torch.tensor([self.heard, self.since, self.alarms], dtype=torch.int64),
            "starts": torch.tensor(self.starts, dtype=torch.int64),
        }

    @classmethod
    def of(cls, kept: dict[str, Tensor] | None, first: int) -> Memory:
        """Returns what a site kept; of one that kept nothing the beginning, with so many first rows."""
        if kept is None or not {"losses", "numbers", "starts"} <= kept.keys():
            return cls(np.empty(0), first)
        heard, since, alarms = kept["numbers"].tolist()
        return cls(kept["losses"].double().numpy(), heard, since, tuple(kept["starts"].tolist()), alarms)

    def after(self, block: Floats, rate: float, seed: int) -> tuple[Memory, int]:
        """Returns what a site keeps after a block whose rows had these losses, and the row of an alarm; -1 for none.

        A loss that is not finite is the largest of all.
        """
        starts, large = (*self.starts, self.since), np.finfo(np.float64).max
        losses = np.concatenate([self.losses, np.nan_to_num(block, nan=large, posinf=large)])
        found = watch(losses, rate, seed + self.alarms)
        if found.alarm is None or found.change is None:
            return replace(self, losses=losses, starts=starts), -1
        heard, since = self.heard + len(losses), self.heard + found.change
        return Memory(np.empty(0), heard, since, starts, self.alarms + 1), self.heard + found.alarm


def at_step(node: Node, context: Context, request: RoundRequest) -> Node:
    """Returns the node with the rows that its sites have at the step which a request is about."""
    if not isinstance(node, RowNode) or not isinstance(node.split, StreamSplit):
        return node
    experiment = node.experiment
    by_round = step_of(request.round_number, experiment.evaluation.every)
    step = request.block if request.block >= 0 else by_round
    since = None
    if experiment.stream.memory == "alarm":
        since = np.zeros(len(node.population), dtype=np.int64)
        replayed = request.block >= 0
        kept = _store(node, context, request).read(after_round=replayed)
        for site, own in zip(node.find(request.names).tolist(), kept, strict=True):
            memory = Memory.of(own, 0)
            starts = memory.starts[step : step + 1] if replayed else ()
            since[site] = starts[0] if starts else memory.since
    return replace(node, split=replace(node.split, step=step, since=since))


def remember(node: Node, context: Context, request: RoundRequest, losses: Sequence[Floats]) -> tuple[int, ...]:
    """Has the sites' alarms hear the losses of a block, and returns the row at which each went off; -1 for none.

    Args:
        node: The node, at the block's step.
        context: The node's context.
        request: The evaluation.
        losses: Of each site of the request, of its block's rows in time.

    Returns:
        Nothing where there is no alarm to hear: other memories, evaluations before training, and those in hindsight.
    """
    if not isinstance(node, RowNode) or not isinstance(node.split, StreamSplit):
        return ()
    stream, seed = node.experiment.stream, node.experiment.runtime.seed
    if stream.memory != "alarm" or request.block >= 0 or request.baseline or not request.round_number:
        return ()
    store = _store(node, context, request)
    ties = (draws(seed, "alarm", 0, site_keys(request.names)) >> np.uint64(33)).tolist()
    found = []
    for name, own, block, tie in zip(request.names, store.read(), losses, ties, strict=True):
        memory, row = Memory.of(own, stream.first_rows).after(block, stream.rate, tie)
        write(store.folder, name, request.round_number, memory.tensors(), request.saved_rounds)
        found.append(row)
    return tuple(found)


def losses_of_rows(outputs: NDArray[np.floating], y: NDArray[np.generic], mask: NDArray[np.floating]) -> Floats:
    """Returns the loss of each row that is there [rows]: the negative log probability, or the squared error.

    Args:
        outputs: The model's outputs [rows, outputs].
        y: Labels [rows], or targets as they are learned [rows] or [rows, targets].
        mask: Which rows are there [rows].
    """
    there = mask > 0
    own, labels = torch.from_numpy(np.asarray(outputs[there], np.float64)), torch.from_numpy(np.asarray(y[there]))
    if labels.is_floating_point():
        squares: Floats = (own.reshape(len(own), -1) - labels.double().reshape(len(own), -1)).square().sum(1).numpy()
        return squares
    logs = own.log_softmax(-1)
    known = labels >= 0  # a label that the run does not know is as wrong as a label can be
    picked = -logs.gather(-1, labels.clamp(min=0).reshape(-1, 1)).reshape(-1)
    values: Floats = torch.where(known, picked, torch.full_like(picked, torch.inf)).numpy()
    return values


def _store(node: RowNode, context: Context, request: RoundRequest) -> LocalStateStore:
    store = LocalStateStore.of(context, node.experiment, request)
    return replace(store, folder=Path(store.folder) / FOLDER)
