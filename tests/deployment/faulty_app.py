"""The real ClientApp, and faults around it: what goes wrong at a node is in its environment.

FEDMETA_TEST_FAULT   "nan", "zeros", "shape" or "error": what becomes of each answer to `train`.
FEDMETA_TEST_MARKS   a folder: the file `SITE-train-ROUND` appears there, with the id of the process, as the node
                     begins to work; while `hold-SITE-train-ROUND` is there, it waits.
"""

import os
import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

from clients.app import app as real

FAULT = os.environ.get("FEDMETA_TEST_FAULT", "")
MARKS = Path(os.environ["FEDMETA_TEST_MARKS"])


class FaultyApp(ClientApp):
    def __call__(self, message: Message, context: Context) -> Message:
        site, kind = str(context.node_config["site"]), message.metadata.message_type
        mark = MARKS / f"{site}-{kind}-{message.metadata.group_id}"
        mark.with_suffix(".part").write_text(str(os.getpid()))
        mark.with_suffix(".part").replace(mark)
        while (MARKS / f"hold-{mark.name}").exists():
            time.sleep(0.1)
        reply = real(message, context)
        if kind == "train" and FAULT:
            break_gradient(reply)
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
