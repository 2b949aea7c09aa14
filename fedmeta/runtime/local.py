"""The local runtime: server and client in this process. No Ray, no sockets, no polling; one node hosts all sites."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, Metadata, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedmeta.experiment import Experiment

RUN_ID, SERVER_ID, NODE_ID = 1, 1, 2
TTL_S = 3600.0
_MESSAGE: Any = Message


class LocalGrid(Grid):
    """A grid of one node, whose ClientApp answers in this process when its reply is pulled.

    Args:
        client: The ClientApp.
        experiment: The run's description, which the node reads from its run config as everywhere.
    """

    complete = True
    """Whether no further node will come."""

    def __init__(self, client: ClientApp, experiment: Experiment) -> None:
        self._client = client
        self.context = Context(
            run_id=RUN_ID,
            node_id=NODE_ID,
            node_config={"partition-id": 0, "num-partitions": 1},
            state=RecordDict(),
            run_config={
                "experiment": experiment.for_sites(),
                "folder": str(Path(experiment.tracking.folder).absolute()),  # in which sites of a simulation keep parts
            },
        )
        self._pending: dict[str, Message] = {}
        self._run: Any = None

    def set_run(self, run: Any) -> None:
        """Keeps Flower's description of the run; this runtime does not need one."""
        self._run = run

    @property
    def run(self) -> Any:
        """What `set_run` was given."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Returns a message to the node."""
        metadata = Metadata(
            run_id=RUN_ID,
            message_id=str(len(self._pending)),
            src_node_id=SERVER_ID,
            dst_node_id=dst_node_id,
            reply_to_message_id="",
            group_id=group_id,
            created_at=time.time(),
            ttl=ttl or TTL_S,
            message_type=message_type,
        )
        # Flower's signature for users leaves out `metadata`; without it a message asks for the identity of a SuperLink.
        message: Message = _MESSAGE(content, metadata=metadata)
        return message

    def get_node_ids(self) -> Iterable[int]:
        """Returns the one node."""
        return [NODE_ID]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Takes messages; returns their ids."""
        taken = {str(len(self._pending) + place): message for place, message in enumerate(messages)}
        self._pending.update(taken)
        return list(taken)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Returns the node's replies to messages that were pushed; each is computed now, once."""
        return [self._client(self._pending.pop(name), self.context) for name in message_ids if name in self._pending]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Returns the node's replies. There is no other process to wait for, so that `timeout` has no effect."""
        return self.pull_messages(self.push_messages(messages))
