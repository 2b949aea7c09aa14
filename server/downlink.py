"""What goes down in fewer bytes: changes of the meta-state, against the last one that a node has.

With `server.compression_down` sites adapt from a chain of states that the server and the nodes compute to the same
bits: the first is the meta-state itself, and each next one is the last plus the packed difference to the meta-state.
What packing leaves out is in the next difference. A node that answered lately gets the changes since then, where they
are fewer bytes than the whole state; any other one gets the state whole. Evaluations are of the meta-state itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import ArrayRecord, RecordDict
from torch import Tensor

from fedmeta.compression import Arrays, pack
from fedmeta.experiment import Experiment
from fedmeta.messages import RoundRequest, write_arrays
from fedmeta.messages.downlink import changed, flat, with_changes, with_whole
from fedmeta.randomness import generator


@dataclass
class Downlink:
    """The chain of states that sites adapt from.

    Attributes:
        experiment: The run's description.
        state: The last state of the chain, with its constants; empty before the first round.
        number: The round of that state.
        changes: The packed changes of the last rounds, the newest last: together fewer bytes than a whole state.
        asked: The last round that each node was asked in, and
        held: the round whose state it has, where it answered.
    """

    experiment: Experiment
    state: dict[str, Tensor] = field(default_factory=dict)
    number: int = 0
    changes: dict[int, Arrays] = field(default_factory=dict)
    asked: dict[int, int] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)
    _whole: ArrayRecord | None = None

    def advance(self, number: int, meta_state: Mapping[str, Tensor]) -> None:
        """Computes the state of a round, where that is not done, from the meta-state."""
        if number == self.number:
            return
        server = self.experiment.server
        self._whole = None
        if not self.state:
            self.state, self.number = dict(meta_state), number
            return
        random = generator(self.experiment.runtime.seed, "compression down", number)
        difference = (flat(meta_state) - flat(self.state))[None]
        arrays = pack(difference, server.compression_down, server.compression_keep, [random])
        self.state = changed(self.state, arrays, server.compression_down, server.compression_keep)
        self.number = number
        self.changes[number] = arrays
        whole = sum(value.numel() * value.element_size() for value in self.state.values())
        while sum(map(_bytes, self.changes.values())) >= whole:
            del self.changes[min(self.changes)]

    def content(self, request: RoundRequest, node: int) -> RecordDict:
        """Returns a request of the round for a node: with the changes since the state that it has, or the whole one."""
        base = self.held.pop(node, 0)
        self.asked[node] = self.number
        missing = range(base + 1, self.number + 1)
        if base and all(number in self.changes for number in missing):
            return with_changes(request.pack(ArrayRecord()), base, {number: self.changes[number] for number in missing})
        if self._whole is None:
            self._whole = write_arrays(self.state)
        return with_whole(request.pack(self._whole))

    def answered(self, node: int) -> None:
        """Notes that a node has the state that it was last asked with."""
        if node in self.asked:
            self.held[node] = self.asked[node]


def _bytes(arrays: Arrays) -> int:
    return sum(np.asarray(value).nbytes for value in arrays.values())
