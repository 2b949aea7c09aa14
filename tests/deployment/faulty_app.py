"""The real ClientApp, and faults around it: what goes wrong at a node is in its environment.

FEDMETA_TEST_FAULT   "nan", "zeros", "shape" or "error": what becomes of each answer to `train`.
FEDMETA_TEST_MARKS   a folder: the file `SITE-train-ROUND` appears there, with the id of the process, as the node
                     begins to work; while `hold-SITE-train-ROUND` is there, it waits; where `lost-SITE-train-ROUND` is
                     there, it fails. A site works `slow-SITE` seconds longer at `train`. A message of a secure sum has
                     the purpose before its round: `SITE-train.masked-train-2`, `SITE-query.keys-evaluate-0`.
                     With `record` there, `sent-SITE-...` gets the arrays of each reply, and of a secure sum the numbers
                     before they are masked.
"""

import os
import pickle
import time
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

from clients import secure
from clients.app import app as real
from fedmeta.messages import payload_bytes

FAULT = os.environ.get("FEDMETA_TEST_FAULT", "")
MARKS = Path(os.environ["FEDMETA_TEST_MARKS"])


class FaultyApp(ClientApp):
    def __call__(self, message: Message, context: Context) -> Message:
        site, kind = str(context.node_config["site"]), message.metadata.message_type
        mark = MARKS / f"{site}-{kind}-{round_of(message)}"
        mark.with_suffix(".part").write_text(str(os.getpid()))
        mark.with_suffix(".part").replace(mark)
        while (MARKS / f"hold-{mark.name}").exists():
            time.sleep(0.1)
        if (MARKS / f"lost-{mark.name}").exists():
            raise RuntimeError("lost")
        if kind == "train" and (slow := MARKS / f"slow-{site}").exists():
            time.sleep(float(slow.read_text()))
        reply = real(message, context) if not (MARKS / "record").exists() else recorded(mark.name, message, context)
        if kind == "train" and FAULT:
            break_gradient(reply)
        return reply


def round_of(message: Message) -> str:
    for record in message.content.config_records.values():
        if "context" in record:
            return "-".join(str(record["context"]).split()[1:])
    return str(message.metadata.group_id)


def recorded(name: str, message: Message, context: Context) -> Message:
    """Answers a message, and writes down what the site computed."""
    found: dict[str, Any] = {}
    before = secure.masked

    def masked(delivery: Any, own: Context, names: Any, numbers: Any) -> Any:
        def clear(sites: int) -> Any:
            values = numbers(sites)
            found["clear"] = values.tobytes()
            return values

        return before(delivery, own, names, clear)

    secure.masked = masked
    try:
        reply = real(message, context)
    finally:
        secure.masked = before
    for record, arrays in reply.content.array_records.items():
        found |= {f"{record}/{key}": array.numpy().tobytes() for key, array in arrays.items()}
        found |= {f"wire/{record}/{key}": array.data for key, array in arrays.items()}
    for record, numbers in reply.content.metric_records.items():
        found |= {f"{record}/{key}": pickle.dumps(value) for key, value in numbers.items()}
    found["bytes"] = payload_bytes(reply.content)
    part = MARKS / f"part-{name}"
    part.write_bytes(pickle.dumps(found))
    part.replace(MARKS / f"sent-{name}")
    return reply


def break_gradient(reply: Message) -> None:
    if FAULT == "error":
        raise RuntimeError("patient 4711 has no blood pressure")
    state = reply.content["gradient"].to_torch_state_dict()
    broken = {
        "nan": {name: torch.full_like(value, float("nan")) for name, value in state.items()},
        "zeros": {name: torch.zeros_like(value) for name, value in state.items()},
        "shape": {name: value.unsqueeze(0) for name, value in state.items()},
    }[FAULT]
    reply.content["gradient"] = ArrayRecord.from_torch_state_dict(broken)


app = FaultyApp()
