"""How well each aggregator withstands false sites: new-site accuracy on HAR with a fifth of the sites attacking.

    python experiments/robust.py --seeds 0 1 2 --rounds 100 --mixing --set server.byzantine=0.3

The attack: in every round, each false site sends its meta-gradient with its sign flipped, times ten. It is injected
between the client app and the server, in this script, and is no part of the product.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message

from clients.app import app
from clients.node import node_of
from fedmeta import Experiment, load_experiment
from fedmeta.errors import FedmetaError
from fedmeta.messages import TRAIN, RoundRequest, TrainReply
from fedmeta.progress import ignore_progress
from fedmeta.runtime.local import LocalGrid
from server import training_loop
from server.membership import Membership

HERE = Path(__file__).parent
SHARE, STRENGTH = 0.2, -10.0
AGGREGATORS = ("mean", "median", "trimmed-mean", "krum", "multi-krum", "bulyan", "norm-bound")
CLEAN = "mean, none false"


class Attack:
    """A client app whose false sites multiply what they send.

    Args:
        false: The names of the false sites.
        strength: What each of them multiplies its gradient by.
    """

    def __init__(self, false: set[str], strength: float) -> None:
        self.false, self.strength = false, strength

    def __call__(self, message: Message, context: Context) -> Message:
        """Answers as the app does, but for the gradients of false sites."""
        request = RoundRequest.unpack(message.content) if message.metadata.message_type == TRAIN else None
        asked = set(request.names) & self.false if request else set()
        reply = app(message, context)
        if request is None or not asked:
            return reply
        like = {name: value for name, value in request.meta_state.items() if not name.startswith("standardisation.")}
        honest = TrainReply.unpack(reply.content, like, request.per_site)
        if request.per_site:
            factors = torch.tensor([self.strength if name in asked else 1.0 for name in honest.names])
            gradient = {
                name: value * factors.reshape(-1, *[1] * (value.dim() - 1)) for name, value in honest.gradient.items()
            }
        else:
            # The node sends the sum over its sites: it is asked for that of the false ones alone, too.
            few = replace(request, names=tuple(name for name in request.names if name in asked))
            message.content = few.pack()
            own = TrainReply.unpack(app(message, context).content, like)
            more = self.strength - 1
            gradient = {name: value.double() + more * own.gradient[name] for name, value in honest.gradient.items()}
        reply.content = replace(honest, gradient=gradient).pack()
        return reply


def accuracy(experiment: Experiment, attacked: bool) -> tuple[float, float]:
    """Runs an experiment; returns the new sites' mean accuracy after and before adaptation."""
    false: set[str] = set()
    client: Any = Attack(false, STRENGTH)
    grid = LocalGrid(client, experiment)
    if attacked:
        training = Membership(grid, experiment).federation
        names = [training.names[site] for site in training.training]
        draw = np.random.default_rng(experiment.runtime.seed)
        false |= set(draw.choice(names, math.ceil(SHARE * len(names)), replace=False).tolist())
    node_of(grid.context)
    summary = training_loop.run(grid, experiment, ignore_progress).summary
    return summary["new_sites"]["personalized"]["mean"], summary["new_sites"]["global"]["mean"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--only", nargs="*", default=[CLEAN, *AGGREGATORS])
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--mixing", action="store_true", help="mix each reply with its nearest ones, but for the mean")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in options.only}
    with tempfile.TemporaryDirectory(prefix="robust-") as folder:
        for seed in options.seeds:
            for name in options.only:
                chosen = [*settings(name, seed, options.rounds, folder), *options.overrides]
                if options.mixing and name not in (CLEAN, "mean"):
                    chosen.append("server.mixing=true")
                experiment = load_experiment(HERE / "har.toml", chosen)
                try:
                    found[name].append(accuracy(experiment, name != CLEAN))
                except FedmetaError as error:
                    # What the attack makes of a run may be a run that cannot continue.
                    found[name].append((np.nan, np.nan))
                    print(name, seed, error, file=sys.stderr, flush=True)
                    continue
                print(name, seed, *(f"{score:.3f}" for score in found[name][-1]), file=sys.stderr, flush=True)
    print(table(found))


def settings(name: str, seed: int, rounds_: int, folder: str) -> list[str]:
    """Returns what a run changes in har.toml."""
    return [
        f"server.aggregator={'mean' if name == CLEAN else name}",
        # Of the 21 sites 15 train: 3 false ones are exactly a fifth, and as many as Bulyan can withstand.
        "data.new_sites=6",
        f"server.rounds={rounds_}",
        f"runtime.seed={seed}",
        "runtime.threads=1",
        "evaluation.every=0",
        "tracking.uri=none",
        f"tracking.folder={folder}",
    ]


def table(found: dict[str, list[tuple[float, float]]]) -> str:
    """Returns the figures as a Markdown table."""
    clean = np.array(found[CLEAN])[:, 0] if CLEAN in found else np.nan
    lines = [
        "| aggregator | new sites, personalized | per seed | global | to the clean run (points) |",
        "|---|---|---|---|---|",
    ]
    for name, scores in found.items():
        personalized, unadapted = np.array(scores).T
        seeds = ", ".join("broke off" if np.isnan(score) else f"{score:.3f}" for score in personalized)
        difference = 100 * (personalized.mean() - np.mean(clean))
        lines.append(f"| {name} | {personalized.mean():.3f} | {seeds} | {unadapted.mean():.3f} | {difference:+.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
