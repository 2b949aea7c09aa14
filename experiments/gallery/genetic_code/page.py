"""Measures what the page of the genetic code shows, and writes it there."""

from __future__ import annotations

import time
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes

from experiments.gallery import measure
from experiments.gallery.genetic_code import genetic_code as code
from fedmeta.learners import build

mpl.use("Agg")
from matplotlib import pyplot as plt

ENTRY = "genetic_code"
CODES = 1_000_000
RESTARTS = 60


def best_of(weight: str, restarts: int, organism: str = "") -> tuple[float, int, torch.Tensor]:
    """Returns the best error of searches by swaps from random codes, how many reach it, and that code."""
    shares = torch.from_numpy(code.mistakes(weight, organism))
    found: list[tuple[float, torch.Tensor]] = []
    for number in range(restarts):
        order = code.random_code(number)
        while True:
            codes = torch.cat([order[None], code.swapped(order)])
            values = code.errors(codes, shares)
            if float(values.min()) > float(values[0]) - 1e-9:  # leucine and isoleucine are alike: their swap is none
                break
            order = codes[int(values.argmin())]
        found.append((float(values[0]), order))
    error, order = min(found, key=lambda pair: pair[0])
    return error, sum(value < error + 1e-9 for value, _ in found), order


def nulls() -> None:
    """The standard code among random ones, for both weights."""
    rows = []
    for weight in code.WEIGHTS:
        shares = code.mistakes(weight)
        standard = float(code.errors(torch.arange(20.0)[None], torch.from_numpy(shares)))
        started = time.perf_counter()
        draws = [code.random_errors(shares, CODES, seed) for seed in measure.SEEDS]
        seconds = time.perf_counter() - started
        better = np.array([(draw < standard).sum() for draw in draws])
        best, reached, _ = best_of(weight, RESTARTS)
        rows.append(
            [
                weight,
                f"{standard:.3f}",
                f"{np.mean(draws):.2f} ± {np.std(draws):.2f}",
                f"{better.sum() / (3 * CODES):.1e} ({', '.join(map(str, better))})",
                f"{best:.3f} ({reached} of {RESTARTS})",
                f"{3 * CODES / seconds / 1e6:.1f} million/s",
            ]
        )
    head = [
        "mistakes", "standard code", "random codes", f"share better (of {CODES:,}, three seeds)",
        "best found (searches that reach it)", "codes evaluated",
    ]  # fmt: skip
    measure.put(ENTRY, "nulls", measure.table(head, rows))


def constraint_and_selection() -> None:
    """How much of the tolerance lies in the blocks, and how much in which amino acid has which."""
    rows = []
    for weight in code.WEIGHTS:
        shuffled = np.mean([code.shuffled_errors(weight, 5_000, seed).mean() for seed in measure.SEEDS])
        blocks = np.mean([code.random_errors(code.mistakes(weight), 100_000, seed).mean() for seed in measure.SEEDS])
        standard = float(code.errors(torch.arange(20.0)[None], torch.from_numpy(code.mistakes(weight))))
        rows += [
            [f"{weight}: constraint (blocks of codons)", f"{shuffled:.2f}", f"{blocks:.2f}"],
            [f"{weight}: selection (who has which block)", f"{blocks:.2f}", f"{standard:.2f}"],
        ]
    measure.put(ENTRY, "constraint", measure.table(["what", "error before", "error after"], rows))


def organisms() -> None:
    """One code for all against each organism's own, on organisms that took no part."""
    rows: dict[str, list[np.ndarray]] = {}
    for seed in measure.SEEDS:
        result = measure.run(ENTRY, seed=seed)
        problem = code.GeneticCode("freeland-hurst")
        learner, sites = build("fedavg-ft", problem, inner_steps=3), problem.sites()
        new = set(measure.new_sites(result))

        def add(name: str, values: list[float], new: set[str] = new, sites: list[str] = sites) -> None:
            kept = [value if site in new else np.nan for site, value in zip(sites, values, strict=True)]
            rows.setdefault(name, []).append(np.array(kept))

        def error(order: torch.Tensor, site: str) -> float:
            return float(code.errors(order[None], torch.from_numpy(code.mistakes("freeland-hurst", site))))

        adapted = measure.scores(learner, result.meta_state, problem, sites, 3, seed)["error"]
        start = measure.scores(learner, learner.init(seed), problem, sites, 3, seed)["error"]
        add("random code", list(start[:, 0]))
        add("random code, 3 own swaps", list(start[:, -1]))
        add("standard code", [error(torch.arange(20.0), site) for site in sites])
        add("the federation's code", list(adapted[:, 0]))
        add("the federation's code, 3 own swaps", list(adapted[:, -1]))
        add(f"own best code ({RESTARTS} searches)", OWN_BEST)
        keys = torch.stack([own["order"] for own in measure.solutions(
            learner, learner.init(seed), problem, measure.training_sites(result), 40, seed=seed)]).mean(0)  # fmt: skip
        add("average of the organisms' own ranks", [error(code.ranks(keys), site) for site in sites])
    lines = []
    for name, values in rows.items():
        both = np.stack(values)
        new = np.isfinite(both).any(0)
        lines.append([name, measure.interval(np.nanmean(both[:, new], axis=0), 4)])
    measure.put(ENTRY, "organisms", measure.table(["code", "error at new organisms [95 % interval]"], lines))


def picture() -> None:
    """A random code, the standard one, and the best found, as tables of polar requirement."""
    _, _, best = best_of("equal", RESTARTS)
    problem, figure = code.GeneticCode("equal"), plt.figure(figsize=(9, 4.6), layout="constrained")
    data = {"mistakes": torch.from_numpy(code.mistakes("equal"))}
    axes: list[Axes] = list(figure.subplots(1, 3))
    for axis, (name, order) in zip(
        axes, (("random", code.random_code(0)), ("standard", torch.arange(20.0)), ("best found", best)), strict=True
    ):
        image = problem.picture({"order": order}, data)
        shown = axis.imshow(np.where(image == 1, np.nan, image)[::12, ::36], cmap="viridis", aspect="auto", vmax=0.9)
        error = float(problem.inner({"order": order}, data))
        axis.set_title(f"{name}: error {error:.2f}", fontsize=10)
        axis.set_xticks(range(4), list(code.BASES))
        axis.set_yticks(range(16), [f"{first}.{third}" for first in code.BASES for third in code.BASES], fontsize=7)
        axis.set_xlabel("second letter")
        for number, codon in enumerate(code.CODONS):
            acid = code.STANDARD[codon]
            text = acid if acid == "*" else code.ACIDS[int(order[code.ACIDS.index(acid)])]
            row, column = 4 * (number // 16) + number % 4, number // 4 % 4
            color = "white" if image[12 * row, 36 * column] < 0.5 else "black"
            axis.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    axes[0].set_ylabel("first and third letter")
    bar = figure.colorbar(shown, ax=axes, ticks=[0, 0.9])
    bar.ax.set_yticklabels(["polar\n(13.0)", "apolar\n(4.8)"])
    figure.savefig(Path(__file__).parent / "codes.png", dpi=80)


if __name__ == "__main__":
    torch.set_num_threads(1)
    OWN_BEST = [best_of("freeland-hurst", RESTARTS, site)[0] for site in code.GeneticCode().sites()]
    nulls()
    constraint_and_selection()
    organisms()
    picture()
