"""Sine curves from a few points: MAML and Meta-SGD by the published protocol (Li, Zhou, Chen and Li 2017, section 4.1).

    python experiments/sinusoid.py [--iterations 60000]

A task is a curve y = A sin(w x + b), A in [0.1, 5], w in [0.8, 1.2], b in [0, pi], at points x in [-5, 5]: K points to
adapt on by one step, and K others that score it in training. A network of 40 + 40 units is trained on 4 new curves an
iteration. Prints the mean squared error after one step on 100 new curves, with 95 % intervals, as in
results/published.md.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

import fedmeta
from fedmeta import learners
from fedmeta.models import build
from fedmeta.task import Batch, Rows

SHOTS = (5, 10, 20)
CURVES, TESTED, POINTS = 4, 100, 100
RATES = {"maml": 0.01, "meta-sgd": 0.05}
"""MAML's inner rate, and where the learned rates begin: the middle of the paper's [0.005, 0.1]."""

META_RATE = 0.001


def curves(count: int, support: int, query: int, draw: torch.Generator) -> Batch:
    """Returns tasks of `count` curves with so many points each, in float32."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=draw)

    amplitude, frequency, phase = uniform(0.1, 5.0, 1), uniform(0.8, 1.2, 1), uniform(0.0, torch.pi, 1)

    def rows(points: int) -> Rows:
        x = uniform(-5.0, 5.0, points)
        return x[..., None], amplitude * torch.sin(frequency * x + phase), torch.ones(count, points)

    return Batch(rows(support), rows(query))


def error(name: str, shots: int, iterations: int, seed: int = 0) -> tuple[float, float]:
    """Returns the mean squared error on new curves after one step, and half its 95 % interval."""
    network = build("mlp", (1,), 1, hidden=(40, 40))
    learner = learners.build(name, network, inner_steps=1, inner_lr=RATES[name])
    state = learner.init(seed)
    optimizer = torch.optim.Adam(list(state.values()), META_RATE)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(iterations):
        total, weight, _ = fedmeta.meta_gradients(learner, state, curves(CURVES, shots, shots, draw), check="off")
        for key, value in state.items():
            value.grad = total[key] / weight
        optimizer.step()
    held_out = torch.Generator().manual_seed(1_000_000 + seed)
    losses = fedmeta.engines.evaluate(learner, state, curves(TESTED, shots, POINTS, held_out))["loss"][:, 1].double()
    return float(losses.mean()), 1.96 * float(losses.std()) / TESTED**0.5


def main() -> None:
    """Trains each learner at each number of points, and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=60_000)
    iterations = parser.parse_args().iterations
    for name in RATES:
        for shots in SHOTS:
            started = time.perf_counter()
            mean, half = error(name, shots, iterations)
            seconds = time.perf_counter() - started
            print(f"{name:<9} {shots:>2} points  {mean:.2f} +- {half:.2f}  {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
