"""Rounds of exact MAML in plain Flower and torch, one site a node, as Flower's guides have it; `rounds.py` runs this.

    python experiments/benchmarks/flower_rounds.py DATA.npz ROUNDS STEPS LR PROCESSORS

PROCESSORS is what each client is given: 2 unless a user asks for something else. Needs only flwr with its simulation,
torch and numpy. Prints the seconds of each round but the first as JSON.
"""

import json
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import Tensor, nn
from torch.func import functional_call

SETTINGS = "FLOWER_ROUNDS"
"""The environment variable that has what was asked for, as JSON: Ray's processes inherit it."""
SERVER_LR = 0.01


@cache
def settings() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(os.environ[SETTINGS])
    return found


@cache
def load() -> tuple[Tensor, Tensor, Tensor, int]:
    data = np.load(settings()["path"])
    x, y, site = (torch.from_numpy(data[name]) for name in ("x", "y", "site"))
    return x, y, site, int(data["hidden"])


def model() -> nn.Module:
    x, y, _, hidden = load()
    return nn.Sequential(nn.Linear(x.shape[1], hidden), nn.ReLU(), nn.Linear(hidden, int(y.max()) + 1))


client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Adapts on the first half of the site's rows, and steps by the gradient of the second half's loss."""
    x, y, site, _ = load()
    own = site == int(context.node_config["partition-id"])
    x, y = x[own], y[own]
    half = len(y) // 2
    net = model()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    theta = dict(net.named_parameters())
    adapted, lr = theta, settings()["lr"]
    for _ in range(settings()["steps"]):
        loss = nn.functional.cross_entropy(functional_call(net, adapted, (x[:half],)), y[:half])
        gradients = torch.autograd.grad(loss, list(adapted.values()), create_graph=True)
        adapted = {name: value - lr * step for (name, value), step in zip(adapted.items(), gradients, strict=True)}
    loss = nn.functional.cross_entropy(functional_call(net, adapted, (x[half:],)), y[half:])
    gradients = torch.autograd.grad(loss, list(theta.values()))
    pairs = zip(theta.items(), gradients, strict=True)
    stepped = OrderedDict((name, (value - SERVER_LR * step).detach()) for (name, value), step in pairs)
    metrics = MetricRecord({"num-examples": len(y), "query_loss": loss.item()})
    return Message(content=RecordDict({"arrays": ArrayRecord(stepped), "metrics": metrics}), reply_to=message)


class Timed(FedAvg):
    """Flower's averaging, which notes when each round ends."""

    ends: list[float]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        found = super().aggregate_train(server_round, replies)
        self.ends.append(time.perf_counter())
        return found


server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    torch.manual_seed(0)
    strategy = Timed(fraction_train=1.0, fraction_evaluate=0.0)
    strategy.ends = []
    rounds = settings()["rounds"] + 1
    result = strategy.start(grid=grid, initial_arrays=ArrayRecord(model().state_dict()), num_rounds=rounds)
    if len(result.train_metrics_clientapp) < rounds:
        raise RuntimeError("a round had no usable reply")
    print(json.dumps(np.diff(strategy.ends).tolist()))


if __name__ == "__main__":
    # Ray's processes find the functions under this module's name, not under that of a script.
    import flower_rounds

    path, *figures = sys.argv[1:]
    asked = {"path": path, "rounds": int(figures[0]), "steps": int(figures[1]), "lr": float(figures[2])}
    os.environ[SETTINGS] = json.dumps(asked)
    run_simulation(
        flower_rounds.server_app,
        flower_rounds.client_app,
        num_supernodes=len(np.unique(np.load(path)["site"])),
        backend_config={"client_resources": {"num_cpus": int(figures[3]), "num_gpus": 0.0}},
    )
