"""Rounds that close before every site has answered: quorum, own deadlines, and what becomes of replies that come late.

A site whose answer is outstanding is busy, and is not asked again before it came or `server.round_timeout` is over.
With `server.late = "drop"` a late reply frees its site and counts for nothing. With "buffer" it is in the next step,
where it weighs 1 / sqrt(1 + s) of what it would, s being the steps since the state that it was computed from (Nguyen et
al. 2022, "Federated Learning with Buffered Asynchronous Aggregation"), and counts towards the quorum: with
`server.quorum = K`, a count, the server then steps whenever K replies are in, which is the asynchronous mode. A message
is taken from the list of what is outstanding when its reply is read, so that none counts twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from flwr.app import Message
from flwr.serverapp import Grid
from torch import Tensor

from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.messages import TrainReply

POLL_S = 0.5
"""How long to wait before asking again for replies (seconds)."""

REMEMBERED = 5
"""Of how many replies a site's usual time is the median."""

Answer = Message | TrainReply
"""A reply as it came, or as a checkpoint kept it."""


@dataclass(frozen=True)
class Outstanding:
    """A message whose reply has not come.

    Attributes:
        node: The node it went to.
        names: The sites it is about.
        round_number: The round it belongs to.
        sent: When it was sent, by the grid's clock.
        arrives: When its reply arrives, where a checkpoint kept that.
        kept: The reply that a checkpoint kept.
    """

    node: int
    names: tuple[str, ...]
    round_number: int
    sent: float
    arrives: float = math.inf
    kept: TrainReply | None = None


@dataclass
class Received:
    """What came before a round closed.

    Attributes:
        on_time: Replies to the round's own messages.
        late: Replies to earlier rounds' that are to be used.
        dropped: Sites whose late replies are not used, and why.
        missing: Sites that the round closed without.
    """

    on_time: list[tuple[Outstanding, Answer]] = field(default_factory=list)
    late: list[tuple[Outstanding, Answer]] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


class Lateness:
    """The messages of a run whose replies are outstanding, and how long sites usually take."""

    def __init__(self, experiment: Experiment, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Begins a run, or resumes one.

        Args:
            experiment: The run's description.
            state: What `state` returned for the checkpoint; empty at the start.
            tensors: What `tensors` returned.
        """
        self._settings = experiment.server
        self._outstanding: dict[str, Outstanding] = {}
        self.clock = float(state.get("clock", 0.0))
        self.times: dict[str, list[float]] = {name: list(own) for name, own in state.get("times", {}).items()}
        for entry in state.get("outstanding", []):
            self._outstanding[entry["id"]] = _restored(entry, tensors)

    @property
    def busy(self) -> frozenset[str]:
        """The sites whose answer is outstanding."""
        return frozenset(name for each in self._outstanding.values() for name in each.names)

    @property
    def arrivals(self) -> list[float]:
        """When the replies arrive that a checkpoint kept."""
        return [each.arrives for each in self._outstanding.values() if each.kept]

    def receive(
        self, grid: Grid, messages: Sequence[tuple[Message, int, tuple[str, ...]]], round_number: int
    ) -> Received:
        """Sends a round's messages, and returns what came before it closed.

        Args:
            grid: Flower's grid.
            messages: The messages, each with its node and sites.
            round_number: The round.
        """
        now, sleep = _clock(grid)
        started = now()
        pushed = grid.push_messages([message for message, _, _ in messages])
        for name, (_, node, names) in zip(pushed, messages, strict=True):
            self._outstanding[name] = Outstanding(node, names, round_number, started)
        asked = sum(len(names) for _, _, names in messages)
        found = Received()
        while True:
            self._collect(grid, now(), round_number, found)
            waiting = [each for each in self._outstanding.values() if each.round_number == round_number]
            if self._enough(found, asked) or not (waiting or (self._outstanding and not asked)):
                break
            if all(now() > each.sent + self._deadline(each.names) for each in waiting) and found.on_time:
                break
            if now() - started >= self._settings.round_timeout:
                break
            sleep(POLL_S)
        self._give_up(now(), found)
        for each in self._outstanding.values():
            if each.round_number == round_number:
                found.missing.update(dict.fromkeys(each.names, "late: the round closed before its reply came"))
        self.clock = now()
        order = lambda pair: (pair[0].round_number, pair[0].names)  # noqa: E731
        found.on_time.sort(key=order)
        found.late.sort(key=order)
        return found

    def staleness(self, each: Outstanding, round_number: int) -> float:
        """Returns what a reply's weight is multiplied by."""
        return 1.0 / math.sqrt(1.0 + round_number - each.round_number)

    def _enough(self, found: Received, asked: int) -> bool:
        quorum = self._settings.quorum
        here = sum(len(each.names) for each, _ in (*found.on_time, *found.late))
        most = asked + sum(len(each.names) for each, _ in found.late)
        wanted = min(quorum, most) if isinstance(quorum, int) else math.ceil(quorum * asked - 1e-9)
        return here >= max(1, wanted)

    def _deadline(self, names: Sequence[str]) -> float:
        """Returns how long sites are waited for by their own usual times; without any, until the timeout."""
        known = [float(np.median(self.times[name])) for name in names if self.times.get(name)]
        if not self._settings.deadline or len(known) < len(names):
            return self._settings.round_timeout
        return self._settings.deadline * max(known)

    def _collect(self, grid: Grid, moment: float, round_number: int, found: Received) -> None:
        for name in list(self._outstanding):
            each = self._outstanding[name]
            answer: Answer | None = each.kept if each.arrives <= moment else None
            if answer is None and each.kept is None:
                answer = next(iter(grid.pull_messages([name])), None)
            if answer is None:
                continue
            del self._outstanding[name]
            for site in each.names:
                self.times[site] = [*self.times.get(site, []), moment - each.sent][-REMEMBERED:]
            old = round_number - each.round_number
            if not old:
                found.on_time.append((each, answer))
            elif self._settings.late == "drop":
                found.dropped.update(dict.fromkeys(each.names, f"its reply to round {each.round_number} came late"))
            elif old > self._settings.staleness:
                why = f"its reply to round {each.round_number} is {old} steps old, and server.staleness is "
                found.dropped.update(dict.fromkeys(each.names, f"{why}{self._settings.staleness}"))
            else:
                found.late.append((each, answer))

    def _give_up(self, moment: float, found: Received) -> None:
        """Frees sites whose answer has been outstanding for `server.round_timeout`."""
        for name, each in list(self._outstanding.items()):
            if moment - each.sent >= self._settings.round_timeout:
                del self._outstanding[name]
                found.dropped.update(dict.fromkeys(each.names, "no reply in time"))

    def state(self, grid: Grid) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Returns what a checkpoint keeps of it.

        In simulation that is also what is under way, so that a resumed run is the unbroken one. A real federation's
        messages are lost with the server: their sites are asked again.
        """
        entries: list[dict[str, Any]] = []
        tensors: dict[str, Tensor] = {}
        under_way = dict(getattr(grid, "in_flight", dict)())
        for name, each in self._outstanding.items():
            arrives, reply = each.arrives, each.kept
            if reply is None and name in under_way:
                arrives, content = under_way[name]
                reply = _parsed(content)
            if reply is None:
                continue
            for key, value in reply.gradient.items():
                tensors[f"{len(entries)}/{key}"] = value
            entries.append(
                {
                    "id": f"kept-{each.round_number}-{'-'.join(each.names)}",
                    "node": str(each.node),
                    "names": list(each.names),
                    "round": each.round_number,
                    "sent": each.sent,
                    "arrives": arrives,
                    "weight": reply.weight,
                    "finite": reply.finite.astype(int).tolist(),
                    "query_loss": [repr(float(loss)) for loss in reply.query_loss],
                    "place": len(entries),
                }
            )
        return {"clock": self.clock, "times": self.times, "outstanding": entries}, tensors


def _parsed(content: Any) -> TrainReply | None:
    from fedmeta.messages.records import MessageError, read_arrays

    try:
        return TrainReply.unpack(content, read_arrays(content, "gradient"))
    except (MessageError, KeyError):
        return None  # a failure: its site is free after a resume


def _restored(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Outstanding:
    start = f"{entry['place']}/"
    reply = TrainReply(
        gradient={name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)},
        weight=float(entry["weight"]),
        names=tuple(entry["names"]),
        query_loss=np.array([float(loss) for loss in entry["query_loss"]], dtype=np.float64),
        finite=np.array(entry["finite"], dtype=bool),
    )
    return Outstanding(
        int(entry["node"]),
        tuple(entry["names"]),
        int(entry["round"]),
        float(entry["sent"]),
        float(entry["arrives"]),
        reply,
    )


def _clock(grid: Grid) -> tuple[Callable[[], float], Callable[[float], None]]:
    """Returns how to read and how to pass the time: a simulation's own clock, or the machine's."""
    return getattr(grid, "now", time.monotonic), getattr(grid, "sleep", time.sleep)


def scaled(reply: TrainReply, factor: float) -> TrainReply:
    """Returns a node's sum and weight times a factor; in the mean it is the site's weight that shrinks."""
    gradient = {name: value.to(torch.float64) * factor for name, value in reply.gradient.items()}
    return TrainReply(gradient, reply.weight * factor, reply.names, reply.query_loss, reply.finite)


def check(experiment: Experiment, grid: Grid) -> list[str]:
    """Checks that a quorum and the rest of an experiment make sense together; returns what a run should report.

    Raises:
        FedmetaError: They do not.
    """
    server, privacy = experiment.server, experiment.privacy
    rules = (
        (
            privacy.secure_aggregation,
            f"[server] quorum = {server.quorum}: must be 1.0 with privacy.secure_aggregation",
            "a secure sum has its own: privacy.survivors",
        ),
        (
            not experiment.plain_cohorts,
            "[server] quorum, late, deadline: must be left alone with sampling, variance_reduction or objective",
            "these count each drawn site by a factor of its round, and late sites are others than those that answer",
        ),
        (
            server.late == "buffer" and server.aggregator != "mean",
            f'[server] late = "buffer": must be "drop" with aggregator = "{server.aggregator}"',
            "robust rules compare gradients at one state, and late ones are of another",
        ),
        (
            server.late == "buffer" and bool(privacy.noise_multiplier),
            '[server] late = "buffer": must be "drop" with privacy.noise_multiplier above 0',
            "the accountant counts a site once in each round that it is drawn for",
        ),
    )
    for broken, refused, reason in rules:
        if broken:
            raise FedmetaError(f"{refused}: {reason}")
    alone = getattr(grid, "complete", False) and not getattr(grid, "splits_sites", False)
    return (
        ["server.quorum has no effect here: one node answers for all sites (runtime.delay simulates)"] if alone else []
    )
