"""The local runtime with sites that take time: simulated delays on a clock that only waiting moves; runs repeat.

`runtime.delay` is a scale in seconds: each site has its speed (log-normal, one standard deviation of the logarithm) and
each reply a draw (exponential), keyed by seed, round and name. Or it names a function of sites' names, the round and a
generator to a delay for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

from fedmeta.build import load_code
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.messages import TRAIN
from fedmeta.messages.records import read_names
from fedmeta.randomness import generator
from fedmeta.runtime.local import LocalGrid


class DelayedGrid(LocalGrid):
    """A local grid whose replies to `train` arrive after a while, by its own clock.

    Attributes:
        clock: The simulated time (seconds).
        alarms: When replies arrive that a checkpoint kept: waiting ends there too.
    """

    splits_sites = True
    """Whether a message is about one site alone, although one node hosts all: each has its own delay."""

    def __init__(self, client: ClientApp, experiment: Experiment) -> None:
        super().__init__(client, experiment)
        self.clock = 0.0
        self.alarms: list[float] = []
        self._experiment = experiment
        self._sent = 0
        self._arriving: dict[str, tuple[float, Message]] = {}

    def now(self) -> float:
        """Returns the simulated time."""
        return self.clock

    def sleep(self, seconds: float) -> None:
        """Moves the clock to the next arrival, at most by so many seconds."""
        coming = [*self.alarms, *(time for time, _ in self._arriving.values())]
        later = [time for time in coming if time > self.clock]
        self.clock = min([self.clock + seconds, *later])

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Takes messages; the node answers at once, and its replies arrive later."""
        names = []
        for message in messages:
            self._sent += 1
            name = f"late-{self._sent}"
            wait = self._delay(message) if message.metadata.message_type == TRAIN else 0.0
            self._arriving[name] = (self.clock + wait, self._client(message, self.context))
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Returns the replies that have arrived, each once."""
        here = [name for name in message_ids if name in self._arriving and self._arriving[name][0] <= self.clock]
        return [self._arriving.pop(name)[1] for name in here]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Returns the replies at once: what is not `train`, or waits for all, takes no simulated time."""
        return [self._client(message, self.context) for message in messages]

    def in_flight(self) -> dict[str, tuple[float, RecordDict]]:
        """Returns by message when its reply arrives, and what it holds."""
        return {name: (time, reply.content) for name, (time, reply) in self._arriving.items() if reply.has_content()}

    def _delay(self, message: Message) -> float:
        names, number = read_names(message.content), int(message.metadata.group_id)
        return float(max(delays(self._experiment, names, number), default=0.0))


def delays(experiment: Experiment, names: Sequence[str], round_number: int) -> list[float]:
    """Returns how long some sites take in a round (simulated seconds).

    Raises:
        FedmetaError: A function of the user's own fails, or returns something else.
    """
    delay, seed = experiment.runtime.delay, experiment.runtime.seed
    if isinstance(delay, float | int):
        found = []
        for name in names:
            speed = np.exp(generator(seed, "speed", 0, name).normal())
            found.append(float(delay * speed * generator(seed, "delay", round_number, name).exponential()))
        return found
    what = f'[runtime] delay = "{delay}"'
    try:
        own = [float(each) for each in load_code(delay, "[runtime] delay")(
            list(names), round_number, generator(seed, "own delay", round_number, names[0] if names else "")
        )]  # fmt: skip
    except FedmetaError:
        raise
    except Exception as error:  # whatever a user's own code raises
        raise FedmetaError(f"{what} failed in round {round_number}: {error}") from error
    if len(own) != len(names) or not all(0 <= each < np.inf for each in own):
        raise FedmetaError(f"{what} must return a finite number of at least 0 for each of {len(names)} sites")
    return own
