"""Measures what the page of lithography shows, and writes it there."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch

from experiments.gallery import measure
from experiments.gallery.lithography import contest
from experiments.gallery.lithography import lithography as litho
from fedmeta.learners import Learner, build

mpl.use("Agg")
from matplotlib import pyplot as plt

ENTRY, STEPS, RATE = "lithography", 5, 200.0


def ends(learner: Learner, problem: litho.Lithography, source: torch.Tensor, site: str) -> np.ndarray:
    """Returns loss, l2 and pvb [2, 3] of a clip under a source, before and after its steps."""
    data = problem.task(site, "test", 0, 0).support
    path = learner.adaptation_path(measure.started(learner, {"source": source}), data, STEPS)
    with torch.no_grad():
        found = [learner.evaluate(own, data) for own in (path[0], path[-1])]
    return np.array([[float(each[metric.name]) for metric in problem.metrics] for each in found])


def source_image(source: torch.Tensor) -> np.ndarray:
    """Returns a source [9, 9]; NaN outside."""
    weights = source.sigmoid()[litho.ORBIT]
    image = np.full((9, 9), np.nan)
    for (x, y), weight in zip(((litho.POINTS + 1) * 4).round().int().tolist(), weights.tolist(), strict=True):
        image[x, y] = weight
    return image


def write_contest() -> None:
    """Writes SimpleILT's row by the contest's kernels beside the published one."""
    before, after = contest.published(Path("../shared/data/iccad2013"))
    lines = [
        ["the target as mask", f"{before[0]:.0f}", f"{before[1]:.0f}"],
        ["SimpleILT here, 20 steps", f"{after[0]:.0f}", f"{after[1]:.0f}"],
        ["SimpleILT, published (OpenILT)", "43408", "52281"],
    ]
    measure.put(ENTRY, "contest", measure.table(["M1_test1", "L2 (nm²)", "process band (nm²)"], lines))


def write_sources() -> None:
    """Writes the table of sources and draws the pictures."""
    problem = litho.Lithography()
    learner, sites = build("maml", problem, inner_steps=STEPS, inner_lr=RATE), problem.sites()
    own = {}
    for site in sites:
        named = str([other for other in sites if other != site])
        own[site] = measure.run(ENTRY, f"data.new_sites={named}".replace("'", '"')).meta_state["source"]
    rows: dict[str, list[np.ndarray]] = {}
    for site in sites:
        learned = measure.run(ENTRY, f'data.new_sites=["{site}"]').meta_state["source"]
        average = torch.stack([own[other] for other in sites if other != site]).mean(0)
        starts = {name: litho.shape_of(name) for name in ("conventional", "annular", "quadrupole")}
        starts |= {"average of the other clips' own sources": average, "**learned source**": learned,
                   "own source (has seen the clip)": own[site]}  # fmt: skip
        for name, source in starts.items():
            rows.setdefault(name, []).append(ends(learner, problem, source, site))
        if site == sites[0]:
            picture(learner, problem, learned, site)
    values = {name: np.stack(found) for name, found in rows.items()}
    lines = [
        [name, measure.interval(found[:, 0, 0]), measure.interval(found[:, 1, 0]),
         measure.interval(found[:, 1, 1], 0), measure.interval(found[:, 1, 2], 0)]
        for name, found in values.items()
    ]  # fmt: skip
    head = ["source", "loss before", f"loss after {STEPS} steps", "L2 after (nm²)", "process band after (nm²)"]
    measure.put(ENTRY, "sources", measure.table(head, lines))
    learned = values["**learned source**"]
    gains = [
        [name, *[measure.interval((learned - found)[:, 1, k], digits, True) for k, digits in ((0, 3), (1, 0), (2, 0))]]
        for name, found in values.items()
        if "**" not in name
    ]
    head = ["learned source against", "loss [95 % interval]", "L2 (nm²)", "process band (nm²)"]
    measure.put(ENTRY, "gains", measure.table(head, gains))
    figure, axis = plt.subplots(figsize=(4.6, 3.2), layout="constrained")
    for name, found in values.items():
        axis.plot(found[:, 1, 1].mean(), found[:, 1, 2].mean(), "*" if "**" in name else "o", label=name.strip("*"))
    axis.set(xlabel="L2 (nm²)", ylabel="process band (nm²)")
    axis.legend(fontsize=7)
    figure.savefig(Path(__file__).parent / "axes.png", dpi=80)


def picture(learner: Learner, problem: litho.Lithography, learned: torch.Tensor, site: str) -> None:
    """Draws a held-out clip under the annular and the learned source."""
    data = problem.task(site, "test", 0, 0).support
    figure, axes = plt.subplots(2, 5, figsize=(10, 4.2), layout="constrained")
    for row, (name, source) in zip(axes, (("annular", litho.shape_of("annular")), ("learned", learned)), strict=True):
        path = learner.adaptation_path(measure.started(learner, {"source": source}), data, STEPS)
        own = problem.constrain(path[-1])
        found, target = problem.prints(own, data), litho.finer(data["target"])
        wrong = torch.stack([found["print"], target, found["print"] * target], 2)
        shown = [(f"{name} source", source_image(source)), ("target", target), ("mask", found["mask"]),
                 ("aerial image", found["image"]), ("print (red: extra, green: missing)", wrong)]  # fmt: skip
        for axis, (title, image) in zip(row, shown, strict=True):
            axis.imshow(np.asarray(image), cmap="gray" if "source" not in title else "inferno")
            axis.set_title(title, fontsize=8)
            axis.set_axis_off()
    figure.savefig(Path(__file__).parent / "prints.png", dpi=80)


if __name__ == "__main__":
    torch.set_num_threads(1)
    parts = {"contest": write_contest, "sources": write_sources}
    for part in sys.argv[1:] or parts:
        parts[part]()
