"""One exchange with the nodes: a message to each about its sites, and the answers that can be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedmeta.messages import FAILURES, MessageError, failure, payload_bytes
from server.federation import NO_NODE, SITE_UNAVAILABLE
from server.round_log import RoundLog

Shares = Mapping[int, tuple[str, ...]]
"""The sites that each node is asked about."""


def messages(
    grid: Grid,
    kind: str,
    number: int,
    shares: Shares,
    content: Callable[[int, tuple[str, ...]], RecordDict],
    log: RoundLog,
) -> list[Message]:
    """Returns a message to each node, and counts their bytes.

    Args:
        grid: Flower's grid.
        kind: The type of the messages.
        number: The round.
        shares: The sites that each node is asked about; those of no node are left out.
        content: Returns the content for a node and its sites.
        log: The round's log.
    """
    found = []
    for node, names in shares.items():
        if node == NO_NODE:
            continue
        packed = content(node, names)
        log.bytes_down += payload_bytes(packed)
        found.append(grid.create_message(packed, kind, node, str(number)))
    return found


def answers(replies: Iterable[Message], shares: Shares, log: RoundLog) -> Iterator[tuple[int, RecordDict]]:
    """Yields each node's answer in the order of its first site; logs errors, failures and silence."""
    received = {reply.metadata.src_node_id: reply for reply in replies}
    for node in sorted(shares, key=lambda node: shares[node][0]):
        reply = received.get(node)
        if reply is None:
            log.fail(shares[node], "no reply in time" if node != NO_NODE else SITE_UNAVAILABLE)
        elif reply.has_error():
            why = f"Flower error code {reply.error.code}: the node is lost or its app did not start"
            log.fail(shares[node], why)
        elif code := failure(reply.content):
            log.fail(shares[node], f"{code}: {FAILURES[code]}")
        else:
            log.bytes_up += payload_bytes(reply.content)
            yield node, reply.content


def check_names(names: tuple[str, ...], asked: tuple[str, ...]) -> None:
    """Raises `MessageError` where a reply is about other sites than it was asked for."""
    if names != asked:
        raise MessageError("it speaks of other sites than it was asked for")
