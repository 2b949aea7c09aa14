"""Measures what the page of adaptive ultrasound shows, and writes it there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch

from experiments.gallery import measure
from experiments.gallery.ultrasound import ultrasound as us
from fedmeta.learners import Learner, build

mpl.use("Agg")
from matplotlib import pyplot as plt

ENTRY = "ultrasound"
STEPS, LONG = 5, 20
RATES = (7.0, 14.0, 28.0)
SPEEDS = 41
Rows = dict[str, list[dict[str, np.ndarray]]]


def speed_of_sound(problem: us.Ultrasound, data: Any) -> dict[str, torch.Tensor]:
    """Returns the modes of the best of 41 layers of one speed of sound, by coherence: the classical correction."""
    profile = us.fat(1.0)
    layers = [amount * profile for amount in torch.linspace(-0.02, 0.06, SPEEDS)]
    best = max(layers, key=lambda delays: float(us.coherence(data["echoes"], delays)))
    return {"modes": us.MODES.T @ best / us.ELEMENTS / us.UNIT}


def tuned(learners: list[Learner], state: dict[str, torch.Tensor], sites: list[str], steps: int, seed: int) -> Learner:
    """Returns the learner with the rate at which a start does best on training sites."""
    few, source = sites[:6], learners[0].problem
    assert isinstance(source, us.Ultrasound)
    means = [measure.scores(own, state, source, few, steps, seed)["coherence"][:, -1].mean() for own in learners]
    return learners[int(np.argmax(means))]


def measured(tissue: str) -> tuple[Rows, list[tuple[Any, Any, Any]]]:
    """Returns each start's metrics [new sites, steps + 1] per seed, and parameters and data to show."""
    rows: Rows = {}
    shown: list[tuple[Any, Any, Any]] = []
    for seed in measure.SEEDS:
        result = measure.run(ENTRY, f"problem.tissue={tissue}", "runtime.check=off", seed=seed)
        problem = us.Ultrasound(tissue)
        new, training = measure.new_sites(result), measure.training_sites(result)
        learners = [build("maml", problem, inner_steps=STEPS, inner_lr=rate) for rate in RATES]

        zero = learners[0].init(seed)
        one, long = tuned(learners, zero, training, STEPS, seed), tuned(learners, zero, training, LONG, seed)
        own = measure.solutions(long, zero, problem, training[:16], LONG, "train", seed)
        random = torch.randn(us.MODES.shape[1], generator=torch.Generator().manual_seed(seed))
        average = measure.started(one, measure.average(own))
        near = tuned(learners, average, training, STEPS, seed)
        again = {"zero start": (one, zero), "random start": (one, {"theta.modes": random}),
                 "average of 16 training sites' own solutions": (near, average),
                 "**MAML**": (learners[1], result.meta_state)}  # fmt: skip
        for name, (learner, state) in again.items():
            rows.setdefault(name, []).append(measure.scores(learner, state, problem, new, STEPS, seed))
        rows.setdefault(f"zero start, {LONG} steps", []).append(
            measure.scores(long, zero, problem, new, LONG, seed))  # fmt: skip
        found: list[dict[str, np.ndarray]] = []
        for site in new:
            support = problem.task(site, "test", 0, seed).support
            classical = measure.started(one, speed_of_sound(problem, support))
            found.append(measure.scores(one, classical, problem, [site], STEPS, seed))
        merged = {name: np.concatenate([each[name] for each in found]) for name in found[0]}
        rows.setdefault(f"speed of sound, {SPEEDS} evaluations (+ steps)", []).append(merged)
        if seed == 0:
            worst = int(np.argmin(rows["zero start"][0]["coherence"][:, 0]))
            task = problem.task(new[worst], "test", 0, seed)
            for name in ("zero start", "**MAML**"):
                learner, state = again[name]
                path = learner.adaptation_path(state, task.support, STEPS)
                shown += [(f"{name.strip('*')}, {k} steps", path[k], task.query) for k in (0, STEPS)]
            shown = [(name, problem.picture(own, data), float(problem.evaluate(own, data)["of_true_delays"]))
                     for name, own, data in shown]  # fmt: skip
    return rows, shown


def write(tissue: str, rows: Rows) -> None:
    """Writes a regime's table, and how MAML compares with the others."""
    lines = []
    values = {name: np.stack([each["of_true_delays"] for each in found]) for name, found in rows.items()}
    for name, share in values.items():
        residual = np.mean([each["residual"][:, -1].mean() for each in rows[name]])
        ends = [measure.interval(share[..., k]) for k in (0, -1)]
        lines.append([name, *ends, f"{residual:.1f}"])
    head = ["start", "before", "after its steps", "delay error after (ns)"]
    measure.put(ENTRY, tissue, measure.table(head, lines))
    learned = values.pop("**MAML**")[..., -1]
    gains = [[name, measure.interval(learned - share[..., -1], 3, True)] for name, share in values.items()]
    measure.put(ENTRY, f"{tissue} gains", measure.table(["MAML against", "higher by [95 % interval]"], gains))


def picture(shown: list[tuple[Any, Any, Any]]) -> None:
    """Draws the point targets."""
    figure, axes = plt.subplots(1, len(shown), figsize=(9, 2.4), layout="constrained")
    for axis, (name, image, share) in zip(axes, shown, strict=True):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1, extent=(-4, 4, 43, 37))
        axis.set_title(f"{name}\n{100 * share:.0f} % of true delays", fontsize=9)
        axis.set_xlabel("mm")
    axes[0].set_ylabel("depth (mm)")
    figure.savefig(Path(__file__).parent / "targets.png", dpi=80)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for kind in ("fat", "chest"):
        found, images = measured(kind)
        write(kind, found)
        if kind == "fat":
            picture(images)
