"""A site's rows at one step of a stream: the rows so far train, the next block tests.

Step s of a stream has a site's first `first + s * block` rows, in time. Those that it remembers it adapts and trains
on; the `block` rows after them score it, and have joined its rows at step s + 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedmeta.data.population import Population
from fedmeta.data.ragged import IntArray
from fedmeta.data.splits import Split, check_in_time
from fedmeta.experiment import Experiment, Stream


@dataclass(frozen=True)
class StreamSplit(Split):
    """The rows of every site at one step of a stream.

    Attributes:
        stream: How rows come, and what is remembered of them.
        step: The step, from 0.
        since: The first row that each site remembers by its alarm [all sites], from 0; None for every site's first.
    """

    stream: Stream
    step: int = 0
    since: IntArray | None = None

    @property
    def half_life(self) -> float:
        """Of how many rows the chance of a row to be drawn halves; 0 = all alike."""
        return self.stream.half_life if self.stream.memory == "discount" else 0.0

    def most_support(self, rows: IntArray) -> IntArray:
        """Returns how many of so many train rows [sites] may be support in training: half of them."""
        return np.minimum(rows - 1, (rows + 1) // 2)

    def joining_sizes(self, sites: IntArray) -> tuple[IntArray, IntArray]:
        """Returns how many rows each site has before the first block, and how many will score it."""
        sizes = self.population.sizes(sites)
        first = np.minimum(sizes, self.stream.first_rows)
        return first, sizes - first

    def train_sizes(self, sites: IntArray) -> IntArray:
        """Returns how many rows each site remembers: one at the least."""
        found: IntArray = self._so_far(sites) - self._starts(sites)
        return found

    def test_sizes(self, sites: IntArray) -> IntArray:
        """Returns how many rows each site's next block has; none where its rows have ended."""
        found: IntArray = np.minimum(self.population.sizes(sites) - self._so_far(sites), self.stream.block)
        return found

    def _so_far(self, sites: IntArray) -> IntArray:
        found: IntArray = np.minimum(
            self.population.sizes(sites), self.stream.first_rows + self.step * self.stream.block
        )
        return found

    def _starts(self, sites: IntArray) -> IntArray:
        """Returns the first row that each site remembers."""
        so_far = self._so_far(sites)
        if self.stream.memory == "window":
            return np.maximum(0, so_far - self.stream.window)
        if self.since is None:
            return np.zeros_like(so_far)
        return np.clip(self.since[sites], 0, so_far - 1)


def stream_split(population: Population, experiment: Experiment) -> StreamSplit:
    """Returns the rows of each site at the first step.

    Raises:
        FedmetaError: The order of rows in time is not known.
    """
    check_in_time(population, "[stream] block")
    rows = population.rows(population.all_sites)
    return StreamSplit(population, experiment.runtime.seed, experiment.data.test, rows, experiment.stream)


def step_of(round_number: int, every: int) -> int:
    """Returns the step of a stream, from 0, that a round trains at, and that an evaluation after it scores."""
    return max(0, round_number - 1) // every
