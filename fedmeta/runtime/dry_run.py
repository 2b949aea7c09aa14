"""A dry run at a site: what its node would send in a run, message by message and byte for byte. Nothing is sent.

The server's own code asks the node's own code in this process, over one round with this site alone, so that what is
shown is what a federation would be sent: other meta-states change the figures and not what they are.
"""

from __future__ import annotations

import base64
import json
import re
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, Message, RecordDict

from clients.app import app
from clients.node import node_of
from clients.policy import counted, policy_of
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.messages import payload_bytes
from fedmeta.progress import ignore_progress
from fedmeta.runtime.local import LocalGrid

_PAIR = re.compile(r'\s*([A-Za-z][\w-]*)=("[^"]*"|[^\s"]+)(?=\s|$)')
_ALONE = (
    "data.new_sites=0",
    "server.rounds=1",
    "server.wait_for=0",
    "server.min_sites=1",
    "evaluation.every=0",
    "evaluation.judge=new_sites",
    "privacy.epsilon=0",
)


@dataclass(frozen=True)
class Reply:
    """One message that a node would send.

    Attributes:
        kind: Which question it answers, as `fedmeta.messages` names them.
        size: Its payload (bytes): arrays as they are, numbers as 8 bytes, texts in UTF-8.
        entries: What it holds: record, key, and the value; arrays as bytes in base64 with type and shape.
    """

    kind: str
    size: int
    entries: tuple[tuple[str, str, Any], ...]


def dry_run(experiment: Experiment, node_config: str) -> list[Reply]:
    """Returns the messages that a node would send, in the order in which it would be asked.

    Args:
        experiment: The run's description.
        node_config: What the node is started with: `site="NAME" data="FILE"`.

    Raises:
        FedmetaError: The node config or the site's data is not as it should be.
    """
    config = read_node_config(node_config)
    if "data" not in config:
        raise FedmetaError(f'--node-config "{node_config}": data="FILE" is missing')
    with tempfile.TemporaryDirectory(prefix="fedmeta-") as folder:
        alone = experiment.with_overrides([*_ALONE, "tracking.uri=none", f"tracking.folder={folder}"])
        if alone.server.aggregator != "mean":
            # All of these have a node send the same; this one takes a single reply.
            alone = alone.with_overrides(["server.aggregator=median", "server.byzantine=0.0"])
        grid = _RecordingGrid(app, alone)
        # Personal parameters stay at the site, and those of a dry run are none.
        grid.context.node_config.clear()
        grid.context.node_config.update({**config, "state": f"{folder}/state"})
        node_of(grid.context)  # errors in the data are reported in full here, since they are the user's own
        from server import training_loop

        training_loop.run(grid, alone, ignore_progress)
    return [_reply(message) for message in grid.replies]


def read_node_config(text: str) -> dict[str, bool | int | float | str]:
    """Reads a node config as Flower writes them: `key="text" other=3`."""
    pairs, place = [], 0
    while place < len(text.rstrip()):
        found = _PAIR.match(text, place)
        if found is None:
            raise FedmetaError(f'--node-config "{text}": write site="NAME" data="FILE", texts in double quotes')
        pairs.append(f"{found[1]} = {found[2]}")
        place = found.end()
    try:
        return tomllib.loads("\n".join(pairs))
    except tomllib.TOMLDecodeError as error:
        raise FedmetaError(f'--node-config "{text}": {error}') from None


def granted(node_config: str) -> list[str]:
    """Returns the policy that a node with this config would have, as lines for people.

    Raises:
        FedmetaError: The config, or the policy beside the data, is not as it should be.
    """
    config = read_node_config(node_config)
    policy = policy_of(config)
    return policy.lines(counted(config)) if policy else []


def format_messages(replies: Sequence[Reply], as_json: bool) -> str:
    """Returns messages as text: with every value, arrays by type and shape; as JSON lines with every byte."""
    if as_json:
        return "\n".join(
            json.dumps({"message": reply.kind, "bytes": reply.size, **_nested(reply)}) for reply in replies
        )
    lines = []
    for reply in replies:
        lines.append(f"{reply.kind}: {reply.size} bytes")
        for record, key, value in reply.entries:
            shown = json.dumps(value)
            if isinstance(value, dict):
                shown = f"{value['type']} {value['shape']}, {len(base64.b64decode(value['base64']))} bytes"
            lines.append(f"    {record}.{key} = {shown}")
    return "\n".join(
        [*lines, f"{len(replies)} messages, {sum(reply.size for reply in replies)} bytes; nothing was sent"]
    )


def _nested(reply: Reply) -> dict[str, dict[str, Any]]:
    records: dict[str, dict[str, Any]] = {}
    for record, key, value in reply.entries:
        records.setdefault(record, {})[key] = value
    return records


class _RecordingGrid(LocalGrid):
    """A local grid that keeps every reply."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.replies: list[Message] = []

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Returns the node's replies, and keeps them."""
        replies = list(super().pull_messages(message_ids))
        self.replies += replies
        return replies


def _reply(message: Message) -> Reply:
    content: RecordDict = message.content
    return Reply(message.metadata.message_type, payload_bytes(content), tuple(_entries(content)))


def _entries(content: RecordDict) -> Iterator[tuple[str, str, Any]]:
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            for key, array in record.items():
                value = array.numpy()
                data = base64.b64encode(value.tobytes()).decode("ascii")
                yield name, key, {"type": str(value.dtype), "shape": list(value.shape), "base64": data}
        else:
            yield from ((name, key, value) for key, value in record.items())
