"""Measures what the page of bridges shows, and writes it there."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch

from experiments.gallery import measure
from experiments.gallery.bridges import bridges
from fedmeta.learners import Learner, build

mpl.use("Agg")
from matplotlib import pyplot as plt

ENTRY, LOG = "bridges", "log_compliance"
STEPS, LONG = 5, 40


def topology() -> None:
    """Starts of optimality criteria, against forty steps from an even density."""
    problem = bridges.Topology()
    rows: dict[str, list[np.ndarray]] = {}
    reference: list[np.ndarray] = []
    for seed in measure.SEEDS:
        result = measure.run(ENTRY, "runtime.check=off", seed=seed)
        new, training = measure.new_sites(result), measure.training_sites(result)
        learner = build("maml", problem, inner_steps=STEPS, inner_lr=0.2)
        even = learner.init(seed)
        designs = measure.solutions(learner, even, problem, training, LONG)
        tasks = [problem.task(site, "train", 1, seed) for site in training]
        worth = [np.mean([float(problem.outer(own, task.query)) for task in tasks]) for own in designs]
        random = torch.rand(even["theta.density"].shape, generator=torch.Generator().manual_seed(seed))
        starts = {
            "even density": even,
            "random density": {"theta.density": random.double()},
            "best fixed design, of the training sites'": measure.started(learner, designs[int(np.argmin(worth))]),
            "average of the training sites' designs": measure.started(learner, measure.average(designs)),
            "**MAML**": result.meta_state,
        }
        for name, state in starts.items():
            rows.setdefault(name, []).append(measure.scores(learner, state, problem, new, STEPS)[LOG])
        reference.append(measure.scores(learner, even, problem, new, LONG)[LOG][:, -1])
        if seed == 0:
            picture(problem, learner, starts["even density"], starts["**MAML**"], new)
    values, best = {name: np.stack(found) for name, found in rows.items()}, np.stack(reference)
    lines = [
        [name, *[f"{np.exp((found[..., k] - best).mean()):.3f}" for k in (0, 2, 5)]] for name, found in values.items()
    ]
    lines.append([f"even density, {LONG} steps (the classical method: {LONG} solves)", "", "", "1"])
    measure.put(ENTRY, "topology", measure.table(["start", "before", "after 2 steps", "after 5 steps"], lines))
    gains = [
        [name, *[measure.interval((values["**MAML**"] - found)[..., k], 3, True) for k in (2, 5)]]
        for name, found in values.items()
        if "MAML" not in name
    ]
    head = ["MAML, trained for 2 steps, against", "2 steps [95 % interval]", "5 steps [95 % interval]"]
    measure.put(ENTRY, "gains", measure.table(head, gains))


def truss() -> None:
    """Sizing and shape: what a start is worth where the optimum is a formula, and where it is not."""
    lines = []
    for kind, rate, steps, lr in ((bridges.Sizing, 1.0, 1, 0.001), (bridges.Shape, 0.5, 3, 0.05)):
        name, problem = kind.__name__, kind()
        learner = build("maml", problem, inner_steps=steps, inner_lr=rate)
        rows: dict[str, list[np.ndarray]] = {}
        for seed in measure.SEEDS:
            own = [
                f"problem.name=experiments.gallery.bridges.bridges:{name}",
                f"learner.inner_steps={steps}",
                "runtime.check=off",
            ]
            settings = [f"learner.inner_lr={rate}", f"server.lr={lr}", "runtime.engine=vmap"]
            result = measure.run(ENTRY, *own, *settings, seed=seed)
            new, zero = measure.new_sites(result), learner.init(seed)
            designs = measure.solutions(learner, zero, problem, measure.training_sites(result), 30)
            average = measure.started(learner, measure.average(designs))
            best = measure.scores(learner, zero, problem, new, 100)[LOG][:, -1]
            for what, state in (("even start", zero), ("average of designs", average), ("MAML", result.meta_state)):
                found = measure.scores(learner, state, problem, new, steps)[LOG] - best[:, None]
                rows.setdefault(what, []).append(found)
        for what, found in rows.items():
            both = np.stack(found)
            ends = [measure.interval(100 * np.expm1(both[..., k]), 2) for k in (0, -1)]
            lines.append([f"{name.lower()}, {steps} step{'s' * (steps > 1)}", what, *ends])
    head = ["level", "start", "above the optimum before (%)", "after (%)"]
    measure.put(ENTRY, "truss", measure.table(head, lines))


def picture(problem: bridges.Topology, learner: Learner, even: dict, learned: dict, sites: list[str]) -> None:
    """Draws two new bridges from both starts, before and after two steps, and after forty."""
    figure, axes = plt.subplots(2, 5, figsize=(10, 2.6), layout="constrained")
    for row, site in zip(axes, sites[:2], strict=True):
        data = problem.task(site, "test", 0, 0).support
        long = learner.adaptation_path(even, data, LONG)
        short = learner.adaptation_path(learned, data, 2)
        shown = [("even start", long[0]), ("2 steps", long[2]), (f"{LONG} steps", long[LONG]),
                 ("learned start", short[0]), ("2 steps", short[2])]  # fmt: skip
        for axis, (name, own) in zip(row, shown, strict=True):
            found = problem.constrain(own)
            axis.imshow(problem.picture(found, data), cmap="gray", vmin=0, vmax=1)
            axis.set_title(f"{name}: c = {float(problem.inner(found, data)):.1f}", fontsize=8)
            axis.set_axis_off()
    figure.savefig(Path(__file__).parent / "densities.png", dpi=80)


if __name__ == "__main__":
    torch.set_num_threads(1)
    truss()
    topology()
