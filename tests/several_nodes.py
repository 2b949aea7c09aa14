"""A network in this process: several nodes run the real ClientApp, and what comes back may be tampered with."""

from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Context, Error, Message, Metadata, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedmeta.experiment import Experiment

NODE_IDS = (0xF123456789ABCDEF, 5, 0x8000000000000000, 77, 12345678901234567890)
"""Flower draws node ids from all 64 bits, and in no order."""

Fault = Callable[[Message, Message], Message | None]
"""Takes a message to a node and the node's reply; returns what arrives, or None where nothing does."""

_MESSAGE: Any = Message


class SeveralNodes(Grid):
    """A grid of nodes that share an experiment's sites.

    Args:
        client: The ClientApp.
        experiment: What the nodes' run config holds.
        node_configs: Each node's config; by default a share of the sites.
    """

    def __init__(
        self,
        client: ClientApp,
        experiment: Experiment,
        nodes: int = 3,
        node_configs: list[dict[str, Any]] | None = None,
    ) -> None:
        configs = node_configs or [{"partition-id": part, "num-partitions": nodes} for part in range(nodes)]
        self.client = client
        self.experiment = experiment
        self.contexts: dict[int, Context] = {}
        self.faults: dict[int, Fault] = {}
        self.sent: list[Message] = []
        for node, config in zip(NODE_IDS, configs, strict=False):
            self.join(node, config)

    def join(self, node: int, config: dict[str, Any], experiment: Experiment | None = None) -> None:
        toml = (experiment or self.experiment).to_toml()
        self.contexts[node] = Context(1, node, config, RecordDict(), {"experiment": toml})

    def leave(self, node: int) -> dict[str, Any]:
        return dict(self.contexts.pop(node).node_config)

    def set_run(self, run: Any) -> None:
        raise AssertionError("no run is set here")

    @property
    def run(self) -> Any:
        raise AssertionError("no run is asked for here")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        metadata = Metadata(1, str(len(self.sent)), 1, dst_node_id, "", group_id, 0.0, 60.0, message_type)
        message: Message = _MESSAGE(content, metadata=metadata)
        return message

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise AssertionError("the server sends and receives at once")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise AssertionError("the server sends and receives at once")

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Returns the replies in the reverse order of the messages, for no order is promised."""
        arrived = []
        for message in messages:
            self.sent.append(message)
            reply = self._answer(message)
            if reply is not None:
                arrived.append(reply)
        return arrived[::-1]

    def _answer(self, message: Message) -> Message | None:
        node = message.metadata.dst_node_id
        if node not in self.contexts:
            return lost(message)
        reply = self.client(message, self.contexts[node])
        return self.faults[node](message, reply) if node in self.faults else reply


def lost(message: Message) -> Message:
    """Returns what Flower says in the place of a node that is gone."""
    error: Message = _MESSAGE(Error(code=5, reason="the reply's text, which must not be passed on"), reply_to=message)
    return error


def silence(message: Message, reply: Message) -> None:
    return None


def breaks(message: Message, reply: Message) -> Message:
    return lost(message)
