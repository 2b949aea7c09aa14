"""Measures what the page of anchors shows, and writes it there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from torch import Tensor

from experiments.gallery import measure
from experiments.gallery.anchors import anchors as own
from fedmeta.learners import Learner, build

mpl.use("Agg")
from matplotlib import pyplot as plt

ENTRY, STEPS, LONG, RATE = "anchors", 3, 30, 0.05
RATES = (0.1, 0.3, 1.0, 3.0)
BOXES = (
    "problem.name=experiments.gallery.anchors.anchors:Boxes",
    "data.new_sites=9",
    "server.rounds=100",
    "server.sites_per_round=12",
    "server.lr=0.01",
)
Rows = dict[str, list[np.ndarray]]


def tuned(problem: own.Boxes, state: dict[str, Tensor], sites: list[str]) -> Learner:
    """Returns a learner with the rate at which a start does best on training sites."""
    learners = [build("maml", problem, inner_steps=STEPS, inner_lr=rate) for rate in RATES]
    found = [measure.scores(each, state, problem, sites, STEPS)["mean_iou"][:, -1].mean() for each in learners]
    return learners[int(np.argmax(found))]


def alone(problem: own.Boxes) -> Rows:
    """Returns mean IoU [new sites] per seed of anchors by each method, all for twenty boxes of a new site."""
    rows: Rows = {}
    for seed in measure.SEEDS:
        first = measure.run(ENTRY, *BOXES, "server.rounds=1", "runtime.check=off", seed=seed)
        new, training = measure.new_sites(first), measure.training_sites(first)
        tasks = {site: problem.task(site, "test", 0, seed) for site in new}
        known = {site: torch.cat([problem.task(site, "train", r, seed).support["boxes"] for r in range(1, 8)])
                 for site in training}  # fmt: skip
        common = own.k_means(torch.cat(list(known.values())), 5, seed)
        each = [own.k_means(boxes, 5, seed) for boxes in known.values()]
        average = torch.stack([a[a.prod(1).argsort()] for a in each]).log().mean(0)
        zero = build("maml", problem, inner_steps=STEPS).init(seed)
        starts = {"random start": zero, "average of the sites' own anchors": {"theta.anchors": average},
                  "k-means of all training boxes": {"theta.anchors": common.log()}}  # fmt: skip
        for name, state in starts.items():
            found = measure.scores(tuned(problem, state, training), state, problem, new, STEPS, seed)["mean_iou"]
            rows.setdefault(f"{name}, {STEPS} steps", []).append(found[:, -1])
            if "k-means" in name:
                rows.setdefault(f"{name} (best fixed setting)", []).append(found[:, 0])
        learner = tuned(problem, starts["k-means of all training boxes"], training)
        result = measure.run(ENTRY, *BOXES, f"learner.inner_lr={learner.inner_lr}", "runtime.check=off", seed=seed)
        found = measure.scores(learner, result.meta_state, problem, new, STEPS, seed)["mean_iou"]
        rows.setdefault(f"**MAML, {STEPS} steps**", []).append(found[:, -1])
        for name, start in (("own k-means on twenty boxes (the classical method)", None),
                            ("own k-means, from that of all", common)):  # fmt: skip
            found = [own.k_means(task.support["boxes"], 5, seed, start).log() for task in tasks.values()]
            values = [problem.evaluate({"anchors": anchors}, task.query)["mean_iou"]
                      for anchors, task in zip(found, tasks.values(), strict=True)]  # fmt: skip
            rows.setdefault(name, []).append(np.array(values, dtype=float))
        best = [problem.evaluate({"anchors": own.k_means(task.query["boxes"], 5, seed).log()}, task.query)["mean_iou"]
                for task in tasks.values()]  # fmt: skip
        rows.setdefault("k-means on the very boxes that score (optimum, nearly)", []).append(
            np.array(best, dtype=float)
        )
    return rows


def detectors() -> dict[str, list[dict[str, np.ndarray]]]:
    """Returns ap50 and recall50 [new sites, steps + 1] per seed of each way to set anchors and features."""
    rows: dict[str, list[dict[str, np.ndarray]]] = {}
    for seed in measure.SEEDS:
        result = measure.run(ENTRY, "runtime.check=off", seed=seed)
        new, training = measure.new_sites(result), measure.training_sites(result)
        drawn = own.Scenes()
        boxes = torch.cat([part[1][part[2] > 0] for part in (drawn.scenes[site][0] for site in training)])[:, 2:]
        sizes = " ".join(f"{wide:.1f}x{high:.1f}" for wide, high in own.k_means(boxes, 3, seed).tolist())
        fixed = own.Scenes(anchors=sizes, learned=False)
        settings = (f"problem.anchors={sizes}", "problem.learned=false", "runtime.check=off")
        by_k_means = measure.run(ENTRY, *settings, seed=seed).meta_state
        joint = measure.run(
            ENTRY, *settings, "learner.global_weight=1", seed=seed
        ).meta_state  # the loss before any step

        learner = build("maml", fixed, inner_steps=STEPS, inner_lr=RATE)
        zero = learner.init(seed)
        ways: dict[str, tuple[dict[str, Any], own.Scenes, int]] = {
            "random features, k-means anchors (zero start)": (zero, fixed, STEPS),
            f"the same, {LONG} steps (a writer alone)": (zero, fixed, LONG),
            "features of joint training without adapting, k-means anchors": (joint, fixed, STEPS),
            "meta-learned features, k-means anchors": (by_k_means, fixed, STEPS),
            "**meta-learned features and anchors**": (result.meta_state, drawn, STEPS),
        }
        for name, (state, problem, steps) in ways.items():
            its = build("maml", problem, inner_steps=STEPS, inner_lr=RATE)
            rows.setdefault(name, []).append(measure.scores(its, state, problem, new, steps, seed))
        if seed == 0:
            picture(drawn, learner, {"nothing learned": learner.init(0), "learned": result.meta_state}, new[0])
            learned = result.meta_state["anchors"].exp()
            order = learned.prod(1).argsort()
            text = " ".join(f"{wide:.1f}x{high:.1f}" for wide, high in learned[order].tolist())
            measure.put(ENTRY, "anchors", f"Anchors of seed 0 (pixels): k-means {sizes}; learned {text}.")
    return rows


def picture(problem: own.Scenes, learner: Learner, states: dict[str, Any], site: str) -> None:
    """Draws a new writer's scenes before and after adapting."""
    task = problem.task(site, "test", 0, 0)
    figure, axes = plt.subplots(2, 2, figsize=(7.4, 4), layout="constrained")
    for row, (name, state) in zip(axes, states.items(), strict=True):
        path = learner.adaptation_path(state, task.support, STEPS)
        for axis, k in zip(row, (0, STEPS), strict=True):
            score = float(problem.evaluate(path[k], task.query)["ap50"])
            axis.imshow(problem.picture(path[k], task.query))
            axis.set_title(f"{name}, {k} steps: AP {score:.2f}", fontsize=9)
            axis.set_axis_off()
    figure.savefig(Path(__file__).parent / "scenes.png", dpi=80)


def published(problem: own.Boxes) -> None:
    """Writes k-means on all boxes of VOC beside the published figures."""
    voc = torch.cat([boxes for name, boxes in problem.boxes.items() if name.startswith("voc")])
    lines = []
    for count, figure in ((5, "61.0"), (9, "67.2")):
        found = 100 * float(own.shape_iou(voc, own.k_means(voc, count, 0)).amax(1).mean())
        lines.append([str(count), f"{found:.1f}", figure])
    measure.put(ENTRY, "published", measure.table(["anchors", "mean IoU here (%)", "Redmon and Farhadi 2017"], lines))


def write_alone() -> None:
    """Writes the tables of anchors alone."""
    problem = own.Boxes()
    published(problem)
    rows = {name: np.stack(found) for name, found in alone(problem).items()}
    lines = [[name, measure.interval(found)] for name, found in rows.items()]
    measure.put(ENTRY, "alone", measure.table(["anchors", "mean IoU [95 % interval]"], lines))
    learned = rows.pop(f"**MAML, {STEPS} steps**")
    gains = [[name, measure.interval(learned - found, 3, True)] for name, found in rows.items()]
    measure.put(ENTRY, "alone gains", measure.table(["MAML against", "higher by [95 % interval]"], gains))


def write_scenes() -> None:
    """Writes the tables of detectors, and draws the picture."""
    found = detectors()
    values = {name: {key: np.stack([each[key] for each in own_rows]) for key in ("ap50", "recall50")}
              for name, own_rows in found.items()}  # fmt: skip
    lines = [
        [name, *[measure.interval(own_values[key][..., k], 3) for key in ("ap50", "recall50") for k in (0, -1)]]
        for name, own_values in values.items()
    ]
    head = ["detector", "AP before", f"AP after {STEPS} steps", "recall before", "recall after"]
    measure.put(ENTRY, "scenes", measure.table(head, lines))
    best = values.pop("**meta-learned features and anchors**")
    gains = [
        [name, *[measure.interval(best[key][..., -1] - each[key][..., -1], 3, True) for key in ("ap50", "recall50")]]
        for name, each in values.items()
    ]
    head = ["learned features and anchors against", "AP [95 % interval]", "recall"]
    measure.put(ENTRY, "scenes gains", measure.table(head, gains))


if __name__ == "__main__":
    torch.set_num_threads(1)
    parts = {"boxes": write_alone, "scenes": write_scenes}
    for part in sys.argv[1:] or parts:
        parts[part]()
