"""Measures what the page of the two tiers shows, and writes it there."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch

from experiments.gallery import measure
from experiments.gallery.scf import scf

mpl.use("Agg")
from matplotlib import pyplot as plt

ENTRY, NAMES = "scf", list(scf.RULES)
BY_HAND = "0.5 in 4"
SHOWN = ("Cr2", "CN", "NO2", "H2O")


def measured(first: str) -> tuple[dict[str, np.ndarray], str]:
    """Returns builds, failures and energies [seeds, new sites, 3] of each way to choose, and the learned rules."""
    rows: dict[str, list[list[list[float]]]] = {}
    learned = []
    problem = scf.TwoTiers(first)
    for seed in measure.SEEDS:
        result = measure.run(ENTRY, f"problem.first={first}", seed=seed)
        expected = result.meta_state["theta.expected"]
        learned.append(NAMES[int(expected.argmin())])
        tasks = [problem.task(site, "test", 0, seed) for site in measure.new_sites(result)]
        training = [problem.task(site, "train", 1, seed) for site in measure.training_sites(result)]
        common = torch.bincount(torch.stack([own.support["builds"].argmin() for own in training])).argmax()
        one = {name: [k] * len(tasks) for k, name in enumerate(NAMES)}
        ways = {
            "first tier alone": one["never second order"],
            "second order at once (zero start)": one["second order at once"],
            f"rule by hand: {BY_HAND}": one[BY_HAND],
            "rule that is best at most training molecules": [int(common)] * len(tasks),
            "own experience alone": [int(own.support["builds"].argmin()) for own in tasks],
            "**learned, before own experience** (average of the sites' tables)": [int(expected.argmin())] * len(tasks),
            "**learned, and own experience**": [
                int(((expected + own.support["builds"]) / 2).argmin()) for own in tasks],
            "known best rule": [int(own.query["builds"].argmin()) for own in tasks],
        }  # fmt: skip
        for name, rules in ways.items():
            keys = ("builds", "failed", "energy")
            found = [[float(own.query[key][k]) for key in keys] for k, own in zip(rules, tasks, strict=True)]
            rows.setdefault(name, []).append(found)
    return {name: np.array(found) for name, found in rows.items()}, ", ".join(learned)


def main() -> None:
    """Writes the tables and draws the picture."""
    for first in ("plain", "diis"):
        found, learned = measured(first)
        lines = [
            [name, measure.interval(own[..., 0], 1), f"{100 * own[..., 1].mean():.0f} %",
             f"{1000 * np.nanmean(own[..., 2]):.0f}"]
            for name, own in found.items()
        ]  # fmt: skip
        head = ["rule", "Fock builds [95 % interval]", "failed", "above the lowest energy (millihartree)"]
        measure.put(ENTRY, first, measure.table(head, lines))
        best = found["**learned, and own experience**"][..., 0]
        gains = [
            [name, measure.interval(best - own[..., 0], 1, True)]
            for name, own in found.items()
            if "own exp" not in name
        ]
        gains += [["own experience alone", measure.interval(best - found["own experience alone"][..., 0], 1, True)]]
        measure.put(ENTRY, f"{first} gains", measure.table(["learned, and own experience, against", "builds"], gains))
        measure.put(ENTRY, f"{first} rules", f"Learned rules, of three seeds: {learned} (share in window).")
    one = [["Cr2 at 1.68 Å", "Cr 0 0 0; Cr 0 0 1.68", 0], ["NO2", *scf.MOLECULES["NO2"]]]
    lines = []
    for name, atoms, unpaired in one:
        for first in ("plain", "diis"):
            calculation = scf.Calculation(atoms, unpaired, first)
            for rule in ("never second order", BY_HAND, "0.9 in 8", "second order at once"):
                own = calculation.run(rule)
                end = f"{own.energy:.4f}" if own.converged else "fails"
                lines.append([name, first, rule, str(own.builds), end])
    measure.put(ENTRY, "cases", measure.table(["molecule", "first tier", "rule", "builds", "energy (hartree)"], lines))
    figure, axes = plt.subplots(1, len(SHOWN), figsize=(10, 2.6), layout="constrained", sharey=True)
    for axis, name in zip(axes, SHOWN, strict=True):
        for first, style in (("plain", "--"), ("diis", "-")):
            norms = scf.Calculation(*scf.MOLECULES[name], first).path[0]
            axis.semilogy(range(1, len(norms) + 1), norms, style, label=f"first tier: {first}")
        axis.axhline(scf.TOLERANCE, color="gray", linewidth=0.8)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("Fock builds")
    axes[0].set_ylabel("norm of the gradient")
    axes[0].legend(fontsize=7)
    figure.savefig(Path(__file__).parent / "stall.png", dpi=80)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
