"""Times the cohort engines against each other and against a plain loop of autograd, in paired runs in one process.

    python experiments/benchmarks/engines.py --json experiments/benchmarks/engines.json

Prints a Markdown table of medians in milliseconds, and writes every run's time as JSON. In each repetition
every engine computes the same cohort once, one after the other and each time another one first, so that what else the
machine does falls on all alike. Freed memory is kept by the process, as it is where sites are computed, and the
low-rank form has been seen as often as it takes until it is recorded: a run spends all but its first rounds so.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from clients.app import memory_budget
from fedmeta import models
from fedmeta.engines import fits, meta_gradients, program, trial
from fedmeta.engines.lowrank.capture import WARMUP_CALLS
from fedmeta.learners import Learner, build
from fedmeta.problems.rows import loss
from fedmeta.task import Batch, Task, stack

ENGINES = ("loop", "vmap", "lowrank", "program")
FITTING = {"lowrank": fits, "program": program.fits}


class Block(nn.Module):
    """A transformer block with attention from linear layers, on tokens."""

    def __init__(self, width: int = 64, heads: int = 4, vocabulary: int = 80, classes: int = 80) -> None:
        super().__init__()
        self.heads = heads
        self.tokens = nn.Embedding(vocabulary, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.dense = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x)
        normed = self.norms[0](h)
        query, key, value = (
            layer(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
        h = h + self.out((weights @ value).transpose(1, 2).flatten(2))
        h = h + self.dense(self.norms[1](h))
        return self.head(h.mean(1))


@dataclass(frozen=True)
class Case:
    """One row of the table: a model and a cohort."""

    name: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int
    sites: int = 64
    rows: tuple[int, int] = (20, 20)
    steps: int = 3
    learner: str = "maml"
    tokens: int = 0
    engines: tuple[str, ...] = field(default=ENGINES)

    def learners(self) -> Learner:
        """Returns the learner."""
        return build(self.learner, self.model(), inner_steps=self.steps, inner_lr=0.05)

    def batch(self, device: str = "cpu") -> Batch:
        """Returns a cohort of random rows."""
        torch.manual_seed(0)

        def rows(n: int) -> tuple[Tensor, Tensor]:
            x = torch.randint(0, self.tokens, (n, *self.shape)) if self.tokens else torch.rand(n, *self.shape)
            return x, torch.randint(0, self.classes, (n,))

        return stack([Task(rows(self.rows[0]), rows(self.rows[1])) for _ in range(self.sites)]).to(device)


def mlp(hidden: tuple[int, ...], width: int = 784, classes: int = 10, norm: str = "none") -> Callable[[], nn.Module]:
    """Returns a function that makes a multilayer perceptron."""
    return lambda: models.build("mlp", (width,), classes, hidden=hidden, norm=norm)


def cnn(side: int, classes: int, **settings: object) -> Callable[[], nn.Module]:
    """Returns a function that makes a convolutional network."""
    return lambda: models.build("cnn", (side, side), classes, **settings)


def conv4() -> nn.Module:
    """Returns the network of few-shot learning on Omniglot's images."""
    return models.build("conv4", (28, 28), 5)


IMAGES = ("loop", "lowrank", "program")
"""The engines of convolutions: under `vmap` they become grouped ones."""

SMALL_CNN = {"channels": (8, 16), "kernel": 3, "dense": 64}
CASES = (
    Case("784-128-10", mlp((128,)), (784,), 10),
    Case("784-128-10, GroupNorm", mlp((128,), norm="group"), (784,), 10),
    Case("784-128-10, first-order", mlp((128,)), (784,), 10, learner="fomaml"),
    Case("784-128-10, fedavg", mlp((128,)), (784,), 10, learner="fedavg"),
    Case("784-128-10, head only", mlp((128,)), (784,), 10, learner="anil"),
    Case("784-128-10, rate per layer and step", mlp((128,)), (784,), 10, learner="maml++"),
    Case("784-128-10, rate per element", mlp((128,)), (784,), 10, learner="meta-sgd"),
    Case("784-128-10, 1 step", mlp((128,)), (784,), 10, steps=1),
    Case("784-128-10, 10 steps", mlp((128,)), (784,), 10, steps=10),
    Case("784-128-10, 100 + 100 rows", mlp((128,)), (784,), 10, rows=(100, 100), sites=16),
    Case("561-64-64-6", mlp((64, 64), 561, 6), (561,), 6, sites=30),
    Case("logistic 13-2", mlp((), 13, 2), (13,), 2, sites=32),
    Case("3136-2048-62", mlp((2048,), 3136, 62), (3136,), 62, sites=16),
    Case("transformer block 64", Block, (20,), 80, sites=16, steps=2, tokens=80),
    Case("small CNN", cnn(28, 10, **SMALL_CNN), (28, 28), 10, sites=16, engines=IMAGES),
    Case("FedMeta CNN", cnn(28, 62), (28, 28), 62, sites=4, rows=(10, 10), steps=1, engines=IMAGES),
    Case("conv4, 1 step", conv4, (28, 28), 5, sites=4, rows=(5, 75), steps=1, engines=IMAGES),
    Case("conv4, 5 steps", conv4, (28, 28), 5, sites=2, rows=(5, 75), steps=5, engines=IMAGES),
)


def autograd_loop(learner: Learner, state: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """Returns the sum of exact MAML gradients as one would write it by hand: `autograd.grad(create_graph=True)`."""
    module, names = learner.network.module, learner.network.names
    theta = [state["theta." + name].requires_grad_() for name in names]

    def own_loss(parameters: list[Tensor], rows: tuple[Tensor, ...]) -> Tensor:
        outputs = functional_call(module, dict(zip(names, parameters, strict=True)), (rows[0],))
        return loss(outputs, rows[1], rows[2])

    total = [torch.zeros_like(value, dtype=torch.float64) for value in theta]
    for site in range(batch.sites):
        support, query = (tuple(tensor[site] for tensor in rows) for rows in batch)
        parameters = theta
        for _ in range(learner.inner_steps):
            gradient = torch.autograd.grad(own_loss(parameters, support), parameters, create_graph=True)
            parameters = [value - learner.inner_lr * g for value, g in zip(parameters, gradient, strict=True)]
        for sum_, g in zip(total, torch.autograd.grad(own_loss(parameters, query), theta), strict=True):
            sum_ += g
    return {"theta." + name: value for name, value in zip(names, total, strict=True)}


def matmul_peak(device: str, runs: int = 7) -> float:
    """Returns the device's matrix-product rate in float32, in operations per second."""
    size = 1536 if device == "cpu" else 8192
    one, other = torch.rand(2, size, size, device=device)
    return 2 * size**3 / min(seconds(lambda: one @ other) for _ in range(runs))


def seconds(function: Callable[[], object]) -> float:
    """Returns how long a call takes, on a GPU until it has done what it was given."""
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(case: Case, repeats: int, device: str) -> dict[str, object]:
    """Returns a case's times, what auto chose, the counted operations and the engines' largest disagreement."""
    learner, batch = case.learners(), case.batch(device)
    state = {name: value.to(device) for name, value in learner.init(0).items()}
    budget = memory_budget(0, device)
    ways: dict[str, Callable[[], object]] = {
        name: lambda name=name: meta_gradients(learner, state, batch, name, budget=budget)
        for name in case.engines
        if name not in FITTING or FITTING[name](learner, batch, state) is None
    }
    if learner.estimator == "exact" and case.learner == "maml":
        own = {name: value.clone() for name, value in state.items()}
        ways = {"autograd": lambda: autograd_loop(learner, own, batch), **ways}
    chosen, figures = trial(learner, state, batch)
    ways["clipped"] = lambda: meta_gradients(learner, state, batch, chosen, budget=budget, clip_norm=0.1)
    for name, way in ways.items():
        for _ in range(WARMUP_CALLS if name in ("lowrank", "program") else 1):
            way()
    runs: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            # A run computes round after round by one engine: one that follows another, which fills the caches and takes
            # the memory, would pay for it.
            ways[name]()
            runs[name].append(seconds(ways[name]))
    with FlopCounterMode(display=False) as counter:
        ways[chosen]()
    return {
        "case": case.name,
        "sites": case.sites,
        "rows": case.rows,
        "steps": case.steps,
        "learner": case.learner,
        "chosen": chosen,
        "trial_s": figures,
        "operations": counter.get_total_flops(),
        "seconds": runs,
        "disagreement": disagreement(learner, state, batch, [name for name in ways if name in ENGINES]),
    }


def disagreement(learner: Learner, state: dict[str, Tensor], batch: Batch, engines: list[str]) -> float:
    """Returns the largest relative difference of an engine's sum from the loop's."""
    flat = {
        name: torch.cat([value.flatten() for value in meta_gradients(learner, state, batch, name)[0].values()])
        for name in engines
    }
    return max(float((value - flat["loop"]).norm() / flat["loop"].norm()) for value in flat.values())


def table(results: list[dict[str, object]], peak: float) -> str:
    """Returns the results as a Markdown table."""
    head = ["case", "sites", "rows", "steps", "autograd", *ENGINES, "auto, of the best", "clipped"]
    head += ["x autograd", "x vmap", "GFLOP", "of peak"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for result in results:
        runs, rows = result["seconds"], result["rows"]
        assert isinstance(runs, dict)
        assert isinstance(rows, tuple)
        middle = {name: median(times) for name, times in runs.items()}
        # A run stays with what auto chose before its first round, so that its time is that engine's.
        auto = middle[str(result["chosen"])]
        best = min(middle[name] for name in ENGINES if name in middle)
        operations = float(str(result["operations"]))
        cells = [
            str(result["case"]),
            str(result["sites"]),
            "+".join(map(str, rows)),
            str(result["steps"]),
            *(f"{1e3 * middle[name]:.1f}" if name in middle else "-" for name in ("autograd", *ENGINES)),
            f"{result['chosen']}, {auto / best:.2f}",
            f"{1e3 * middle['clipped']:.1f}",
            f"{middle['autograd'] / auto:.1f}" if "autograd" in middle else "-",
            f"{middle['vmap'] / auto:.1f}" if "vmap" in middle else "-",
            f"{operations / 1e9:.2f}",
            f"{100 * operations / auto / peak:.0f} %",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs the cases and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="runs of each engine, of which the median counts")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the cohort is computed")
    parser.add_argument("--only", default="", help="only the cases whose name contains this")
    parser.add_argument("--json", type=Path, help="where to write every run's time")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    peak = matmul_peak(options.device)
    results = []
    for case in CASES:
        if options.only in case.name:
            print(case.name, file=sys.stderr)
            results.append(measure(case, options.repeats, options.device))
    machine: dict[str, object] = {"processor": platform.processor() or platform.machine(), "threads": options.threads}
    if options.device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    machine |= {"torch": torch.__version__, "matmul_gflops": f"{peak / 1e9:.0f}"}
    print(f"Medians of {options.repeats} paired runs, milliseconds; {machine}\n\n{table(results, peak)}")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
