"""Measures what the page of rare events shows, and writes it there."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch

from experiments.gallery import measure
from experiments.gallery.rare_events import rare_events as rare
from fedmeta.learners import Learner, build

mpl.use("Agg")
from matplotlib import pyplot as plt

ENTRY = "rare_events"
CUT, OFF = "log10_variance_cut", "off_by_a_fifth"
STEPS = 3
LONG = 10


def measured() -> dict[str, dict[str, np.ndarray]]:
    """Returns each start's metrics [seeds, new sites, steps + 1]; the new sites are others for each seed."""
    rows: dict[str, dict[str, list[np.ndarray]]] = {}
    for seed in measure.SEEDS:
        result, problem = measure.run(ENTRY, seed=seed), rare.RareEvents()
        new, training = measure.new_sites(result), measure.training_sites(result)
        slow = build("reptile", problem, inner_steps=STEPS, inner_lr=0.7)
        zero = slow.init(seed)
        own = measure.solutions(slow, zero, problem, training, LONG, "train", seed)
        data = [problem.task(site, "train", 1, seed).support for site in training]
        fixed = min(own, key=lambda start: sum(float(problem.outer(start, each)) for each in data))

        def add(name: str, state: dict, learner: Learner = slow, new: list[str] = new, seed: int = seed,
                problem: rare.RareEvents = problem, steps: int = STEPS) -> None:  # fmt: skip
            for metric, values in measure.scores(learner, state, problem, new, steps, seed).items():
                rows.setdefault(name, {}).setdefault(metric, []).append(values)

        add("zero start (plain sampling at 0 steps)", zero, steps=LONG)
        add("random start", {"theta.shift": torch.randn(20, generator=torch.Generator().manual_seed(seed)).double()})
        add("best fixed shift, of the training sites' own", measure.started(slow, fixed))
        add("average of the training sites' own solutions", measure.started(slow, measure.average(own)))
        add("**learned start (Reptile)**", result.meta_state)
        known = [problem.task(site, "test", 0, seed) for site in new]
        best = [problem.evaluate({"shift": rare.likeliest(task.support)}, task.query) for task in known]
        for metric in (CUT, OFF):
            values = np.array([[float(each[metric])] * (STEPS + 1) for each in best])
            rows.setdefault("known best shift (likeliest failure)", {}).setdefault(metric, []).append(values)
    return {name: {metric: np.stack(v) for metric, v in found.items()} for name, found in rows.items()}


def write(found: dict[str, dict[str, np.ndarray]]) -> None:
    """Writes the table and the picture."""
    columns = [0, 1, 3]
    lines = []
    for name, values in found.items():
        cuts = [measure.interval(values[CUT][..., k], 2) for k in columns]
        off = [f"{100 * values[OFF][..., k].mean():.0f} %" for k in columns]
        lines.append([name, *cuts, *off])
    head = ["start", *[f"log10 cut, {k} steps" for k in columns], *[f"off > 20 %, {k} steps" for k in columns]]
    measure.put(ENTRY, "table", measure.table(head, lines))
    zero = found["zero start (plain sampling at 0 steps)"]
    names = list(found)
    learned, average = found[names[4]], found[names[3]]
    rivals = {
        "average": average[CUT],
        "best fixed shift": found[names[2]][CUT],
        "zero start": zero[CUT][..., : STEPS + 1],
    }
    gains = [
        [f"{other}, {k} steps", measure.interval((learned[CUT] - rival)[..., k], 3, True)]
        for other, rival in rivals.items()
        for k in columns
    ]
    measure.put(
        ENTRY, "gains", measure.table(["learned start against", "log10 of the cut higher by [95 % interval]"], gains)
    )
    missed = 100 * zero[OFF][..., LONG].mean()
    text = (
        f"Multilevel cross-entropy from zero, the classical method, reaches a cut of 10^"
        f"{measure.interval(zero[CUT][..., LONG], 2)} in {LONG} steps of 200 samples, with {missed:.0f} % of "
        f"estimates off by more than a fifth; the learned start has 10^"
        f"{measure.interval(learned[CUT][..., 1], 2)} after one step."
    )
    measure.put(ENTRY, "classical", text)
    figure, axis = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    axis.plot(range(LONG + 1), zero[CUT].mean((0, 1)), "o-", label="zero start")
    for name, style in ((names[1], "v:"), (names[3], "s--"), (names[4], "D-")):
        axis.plot(range(STEPS + 1), found[name][CUT].mean((0, 1)), style, label=name.strip("*"))
    axis.axhline(found[names[5]][CUT].mean(), color="gray", label="known best shift")
    axis.set(xlabel="cross-entropy steps of 200 samples", ylabel="log10 of the variance cut", ylim=(-2, 6.5))
    axis.legend(fontsize=8)
    figure.savefig(Path(__file__).parent / "cut.png", dpi=80)


if __name__ == "__main__":
    torch.set_num_threads(1)
    write(measured())
