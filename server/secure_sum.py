"""One secure sum over a round's sites: four exchanges with their nodes, of which the server learns the sum alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.messages import QUERY_KEYS, QUERY_SHARES, QUERY_UNMASK, MessageError, payload_bytes
from fedmeta.messages.secure import (
    Delivery,
    KeysReply,
    KeysRequest,
    MaskedReply,
    SharesReply,
    SharesRequest,
    UnmaskReply,
    UnmaskRequest,
)
from fedmeta.randomness import generator
from fedmeta.secure.graph import FEWEST, graph_of, least
from fedmeta.secure.ring import Ring
from fedmeta.secure.server import TooFewError, unmask
from server.federation import NO_NODE, SITE_UNAVAILABLE
from server.site_statistics import ask

STEPS = ("keys", "shares", "numbers", "unmasking")

Reply = TypeVar("Reply")


@dataclass
class SecureSum:
    """What came of a secure sum.

    Attributes:
        total: The sum in the ring; None where too few sites were left.
        left: The sites whose numbers are in it.
        failed: The sites that dropped out, with the step and the reason.
        why: Why there is no sum.
        bytes_down: Bytes of all messages sent.
        bytes_up: Bytes of all replies received.
    """

    total: Ring | None = None
    left: tuple[str, ...] = ()
    failed: dict[str, str] = field(default_factory=dict)
    why: str = ""
    bytes_down: int = 0
    bytes_up: int = 0


def secure_sum(
    grid: Grid,
    shares: Mapping[int, tuple[str, ...]],
    experiment: Experiment,
    context: str,
    kind: str,
    request: Callable[[tuple[str, ...]], RecordDict],
    size: int,
) -> SecureSum:
    """Adds up numbers of sites.

    Args:
        grid: Flower's grid.
        shares: The sites to ask, by the node that hosts them.
        experiment: The run's description.
        context: The run, the purpose and the round: secrets are bound to it, and serve no other.
        kind: The type of the message for masked numbers.
        request: Returns what that message asks of some sites, without the shares.
        size: How many numbers each site adds.
    """
    done = SecureSum()
    done.failed.update(dict.fromkeys(shares.get(NO_NODE, ()), SITE_UNAVAILABLE))
    homes = {node: names for node, names in shares.items() if node != NO_NODE}
    asked = sum(map(len, shares.values()))
    survivors = experiment.privacy.survivors
    most = max(FEWEST, least(asked, survivors))

    def too_few(names: int, step: str) -> bool:
        if names >= most:
            return False
        done.why = f"secure aggregation: {names} of {asked} sites were left after {step}, and {most} are the fewest"
        return True

    def exchange(
        message: str,
        content: Callable[[tuple[str, ...]], RecordDict],
        read: Callable[[RecordDict], Reply],
        names_of: Callable[[Reply], tuple[str, ...]],
        here: set[str],
    ) -> list[Reply]:
        """Asks the nodes of some sites; a site whose reply is missing or wrong has dropped out."""
        wanted = {node: tuple(name for name in names if name in here) for node, names in homes.items()}
        contents = {node: content(names) for node, names in wanted.items() if names}
        done.bytes_down += sum(map(payload_bytes, contents.values()))
        found = []
        for node, answer in ask(grid, contents, message, experiment.server.round_timeout).items():
            try:
                if isinstance(answer, str):
                    raise MessageError(answer)
                reply = read(answer)
                if names_of(reply) != wanted[node]:
                    raise MessageError("it answers for other sites than it was asked for")
            except MessageError as error:
                done.failed.update(dict.fromkeys(wanted[node], f"dropped out at {message}: {error}"))
                continue
            done.bytes_up += payload_bytes(answer)
            found.append(reply)
        return found

    if too_few(sum(map(len, homes.values())), "the start"):
        return done
    everyone = {name for names in homes.values() for name in names}
    public = exchange(
        QUERY_KEYS, lambda names: KeysRequest(names, context).pack(), KeysReply.unpack, lambda r: r.names, everyone
    )
    cipher = {name: key for reply in public for name, key in zip(reply.names, reply.cipher, strict=True)}
    mask = {name: key for reply in public for name, key in zip(reply.names, reply.mask, strict=True)}
    if too_few(len(mask), "the exchange of keys"):
        return done

    random = generator(experiment.runtime.seed, f"ring {context}", 0)
    circle = [str(name) for name in random.permutation(sorted(mask))]
    places = {name: place for place, name in enumerate(circle)}
    graph = graph_of(len(circle), survivors)

    def ask_shares(names: tuple[str, ...]) -> RecordDict:
        around = {circle[other] for name in names for other in graph.neighbors(places[name])}
        known = tuple(sorted({*names, *around}))
        return SharesRequest(
            names,
            context,
            graph.sites,
            graph.degree,
            graph.needed,
            known,
            tuple(places[name] for name in known),
            tuple(cipher[name] for name in known),
            tuple(mask[name] for name in known),
        ).pack()

    sent: dict[tuple[str, str], bytes] = {}
    shared: set[str] = set()
    for reply in exchange(QUERY_SHARES, ask_shares, SharesReply.unpack, lambda r: r.names, set(circle)):
        pairs = reply.by_pair()
        for name in reply.names:
            if {to for sender, to in pairs if sender == name} != {circle[p] for p in graph.neighbors(places[name])}:
                done.failed[name] = f"dropped out at {QUERY_SHARES}: it shares with others than its neighbors"
                continue
            shared.add(name)
        sent |= pairs
    if too_few(len(shared), "the exchange of shares"):
        return done

    by_receiver: dict[str, dict[tuple[str, str], bytes]] = {}
    for (sender, receiver), text in sent.items():
        if sender in shared:
            by_receiver.setdefault(receiver, {})[sender, receiver] = text

    def ask_numbers(names: tuple[str, ...]) -> RecordDict:
        texts = {pair: text for name in names for pair, text in by_receiver.get(name, {}).items()}
        return Delivery.of(context, texts).add_to(request(names))

    total = np.zeros(size, dtype=np.uint64)
    left: set[str] = set()
    for masked in exchange(kind, ask_numbers, lambda c: MaskedReply.unpack(c, size), lambda r: r.names, shared):
        total += masked.numbers.sum(axis=0, dtype=np.uint64)
        left.update(masked.names)
    if too_few(len(left), "the masked numbers"):
        return done

    def ask_unmasking(names: tuple[str, ...]) -> RecordDict:
        around = {circle[other] for name in names for other in graph.neighbors(places[name])} | set(names)
        seeds, keys = sorted(around & left), sorted(around & (shared - left))
        return UnmaskRequest(names, context, len(left), tuple(seeds), tuple(keys)).pack()

    held: dict[str, dict[str, bytes]] = {}
    for handed in exchange(QUERY_UNMASK, ask_unmasking, UnmaskReply.unpack, lambda r: r.names, left):
        held |= handed.by_holder()
    if too_few(len(held), "unmasking"):
        return done
    # Who sent numbers and then dropped out is in the sum, and is missing in nothing.
    for name in left:
        done.failed.pop(name, None)
    try:
        done.total = unmask(
            total, ring=circle, graph=graph, context=context, shared=sorted(shared), left=sorted(left),
            public=mask, shares=held,
        )  # fmt: skip
    except TooFewError as error:
        done.why = f"secure aggregation: the masks of {error}"
        return done
    done.left = tuple(sorted(left))
    return done


def check(experiment: Experiment, sites: int) -> list[str]:
    """Checks that secure aggregation and the rest of an experiment make sense together; returns what is off.

    Args:
        experiment: The run's description, with `privacy.secure_aggregation`.
        sites: The number of training sites.

    Raises:
        FedmetaError: They do not.
    """
    server, privacy = experiment.server, experiment.privacy
    cohort = min(server.sites_per_round or sites, sites)
    rules = (
        (
            server.aggregator != "mean",
            f'[server] aggregator = "{server.aggregator}": must be "mean"',
            "any other needs each site's own gradient, which the server does not see",
        ),
        (
            not experiment.plain_cohorts,
            "[server] sampling, variance_reduction and objective: must be left alone",
            "they need each site's own update or loss, which the server does not see",
        ),
        (
            experiment.evaluation.schedule == "auto"
            or bool(experiment.evaluation.patience)
            or experiment.target is not None,
            "[evaluation] schedule, patience and [server] until: must be left alone",
            "they compare the scores of single validation sites, which the server does not see",
        ),
        (
            cohort < FEWEST,
            f"[server] sites_per_round: a round has {cohort} sites, and must have {FEWEST}",
            "in a sum over two each site knows the other's part",
        ),
        (
            privacy.colluding >= least(cohort, privacy.survivors),
            f"[privacy] colluding = {privacy.colluding}: must be below {least(cohort, privacy.survivors)}",
            "that many sites may be all that is left of a round",
        ),
        (
            privacy.colluding >= graph_of(cohort, privacy.survivors).needed,
            f"[privacy] colluding = {privacy.colluding}: must be below {graph_of(cohort, privacy.survivors).needed}",
            "so many shares of a site's secrets give them away",
        ),
        (
            privacy.noise_multiplier * privacy.clip_norm / privacy.quantum > 2.0**49,
            f"[privacy] quantum = {privacy.quantum:g}: must be larger",
            "the noise does not fit into the ring",
        ),
    )
    for broken, refused, reason in rules:
        if broken:
            raise FedmetaError(f"{refused} with privacy.secure_aggregation: {reason}")
    off = ["secure aggregation: off at the server, which sees no site's reply alone: checks of ranges and outliers"]
    if server.norm_cap:
        off.append(f"secure aggregation: server.norm_cap = {server.norm_cap:g} is off; sites shorten by clip_norm")
    if not privacy.clip_norm:
        off.append("secure aggregation: privacy.clip_norm is 0, so that one site may move the sum by any length")
    off.append(
        "secure aggregation: evaluations are sums over groups of at least three sites: no table of sites, no worst "
        "ones, no local-only"
    )
    return off
