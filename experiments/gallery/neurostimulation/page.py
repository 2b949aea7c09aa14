"""Measures what the page of neurostimulation shows, and writes it there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import optuna
import torch

from experiments.gallery import measure
from experiments.gallery.neurostimulation import neurostimulation as stim
from fedmeta.learners import Learner, build

mpl.use("Agg")
from matplotlib import pyplot as plt

ENTRY, STEPS = "neurostimulation", 20
SHOWN = (0, 1, 3, 5, 10, 20)
NAME = "problem.name=experiments.gallery.neurostimulation.neurostimulation:ByGradients"


def learner_of(**settings: Any) -> tuple[Learner, stim.Neurostimulation]:
    """Returns the learner of a problem with these settings, and the problem."""
    problem = stim.Neurostimulation(**settings)
    return build("fedavg-ft", problem, inner_steps=1), problem


def searched(problem: stim.Neurostimulation, sites: list[str], seed: int, ask: Callable[[int], Callable]) -> np.ndarray:
    """Returns regrets [sites, steps + 1] of a method that keeps the best setting that it saw.

    Args:
        problem: The patients.
        sites: Their names.
        seed: The seed.
        ask: Returns, for a key, a function of one that takes a setting and returns its outcome; it runs all trials.
    """
    rows = []
    for site in sites:
        data = problem.task(site, "test", 0, seed).support
        truth, seen = data["responses"][0], list[tuple[int, float]]()

        def trial(setting: int, data: dict = data, seen: list = seen) -> float:
            seen.append((setting, float(problem.observe(data, setting, len(seen)))))
            return seen[-1][1]

        ask(int(data["seed"]))(trial)
        best = [max(seen[: k + 1], key=lambda pair: pair[1])[0] for k in range(STEPS)]
        rows.append([np.nan, *[float(truth.max() - truth[setting]) for setting in best]])
    return np.array(rows)


def random_search(key: int) -> Callable:
    """Returns a run of twenty random settings."""
    return lambda trial: [trial(int(k)) for k in np.random.default_rng(key).integers(0, 500, STEPS)]


def by_optuna(sampler: Callable[[int], optuna.samplers.BaseSampler]) -> Callable[[int], Callable]:
    """Returns a run of twenty trials of an Optuna sampler, over amplitude, log frequency and contact."""

    def start(key: int) -> Callable:
        def run(trial: Callable[[int], float]) -> None:
            study = optuna.create_study(direction="maximize", sampler=sampler(key))
            for _ in range(STEPS):
                asked = study.ask()
                places = [asked.suggest_int(name, 0, top) for name, top in (("a", 9), ("f", 9), ("c", 4))]
                study.tell(asked, trial(places[0] * 50 + places[1] * 5 + places[2]))

        return run

    return start


def main() -> None:
    """Writes the tables and draws the pictures."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    learner, problem = learner_of()
    rows: dict[str, list[np.ndarray]] = {}
    limits: dict[str, list[np.ndarray]] = {}
    drifts: dict[str, list[np.ndarray]] = {}
    for seed in measure.SEEDS:
        result = measure.run(ENTRY, seed=seed)
        new, training = measure.new_sites(result), measure.training_sites(result)
        steps = ["server.rounds=60", "server.sites_per_round=10", "server.optimizer=adam", "server.lr=0.03"]
        gradients = measure.run(ENTRY, NAME, *steps, seed=seed).meta_state
        plain = learner.init(seed)
        own = [
            problem.payload([learner.theta(plain)], problem.task(site, "train", 1, seed))["first"] for site in training
        ]
        averaged = {**plain, "theta.mean": torch.stack(own).mean(0)}
        states = {
            "Gaussian process, nothing learned": plain,
            "average of the patients' own means": averaged,
            "prior by gradients": gradients,
            "**prior by sums**": result.meta_state,
        }
        rows.setdefault("random search", []).append(searched(problem, new, seed, random_search))
        for name, state in states.items():
            rows.setdefault(name, []).append(measure.scores(learner, state, problem, new, STEPS, seed)["regret"])
        truth = problem.responses.numpy()
        numbers = [int(site.rpartition("-")[2]) for site in training]
        fixed = int(truth[numbers].mean(0).argmax())
        rest = np.array([truth[int(site[-2:])].max() - truth[int(site[-2:])][fixed] for site in new])
        rows.setdefault("best fixed setting (training patients' true mean)", []).append(
            np.repeat(rest[:, None], STEPS + 1, axis=1))  # fmt: skip
        if seed == 0:
            for name, kind in (("Optuna TPE", optuna.samplers.TPESampler), ("Optuna GP", optuna.samplers.GPSampler)):
                few = searched(problem, new[:4], seed, by_optuna(lambda key, kind=kind: kind(seed=key)))
                rows.setdefault(f"{name} (4 patients)", []).append(few)
        for name, limited in (("without", False), ("with", True)):
            other, patients = learner_of(limit=limited)
            found = measure.scores(other, result.meta_state, patients, new, STEPS, seed)
            limits.setdefault(name, []).append(np.stack([found["regret"][:, -1], found["harmful_trials"][:, -1]]))
        for memory in (0, 40, 8):
            other, patients = learner_of(memory=memory, drift=15)
            regret = measure.scores(other, result.meta_state, patients, new, 30, seed)["regret"]
            drifts.setdefault(f"{memory} trials" if memory else "none", []).append(regret)
        if seed == 0:
            picture(learner, problem, plain, result.meta_state, new[0])
    values = {name: np.stack(found) for name, found in rows.items()}
    lines = [
        [name, *["" if np.isnan(found[..., k]).any() else measure.interval(found[..., k], 2) for k in SHOWN]]
        for name, found in values.items()
    ]
    measure.put(ENTRY, "regret", measure.table(["method", *[f"{k} trials" for k in SHOWN]], lines))
    learned = values["**prior by sums**"]
    gains = [
        [
            name,
            *[
                measure.interval((learned[: len(found), : found.shape[1]] - found)[..., k], 2, True)
                for k in (1, 5, 10, 20)
            ],
        ]
        for name, found in values.items()
        if "**" not in name
    ]
    head = ["prior by sums against", *[f"{k} trials [95 % interval]" for k in (1, 5, 10, 20)]]
    measure.put(ENTRY, "gains", measure.table(head, gains))
    both = {name: np.stack(found) for name, found in limits.items()}
    lines = [
        [
            name,
            measure.interval(found[:, 0], 2),
            f"{100 * found[:, 1].mean() / STEPS:.1f} %",
            f"{found[:, 1].max():.0f}",
        ]
        for name, found in both.items()
    ]
    head = ["limit", "regret after 20", "harmful trials", "most at one patient (of 20)"]
    measure.put(ENTRY, "limit", measure.table(head, lines))
    drifted = {name: np.stack(found) for name, found in drifts.items()}
    lines = [[name, *[measure.interval(found[..., k], 2) for k in (15, 16, 20, 30)]] for name, found in drifted.items()]
    measure.put(ENTRY, "drift", measure.table(["memory", "15 trials", "16", "20", "30"], lines))
    figure, axis = plt.subplots(figsize=(8.4, 3.4), layout="constrained")
    for name, found in values.items():
        axis.plot(np.nanmean(found, axis=(0, 1)), "-" if "**" in name else "--", label=name.strip("*"))
    axis.set(xlabel="trials", ylabel="regret", xticks=range(0, 21, 5), ylim=(0, None))
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(Path(__file__).parent / "regret.png", dpi=80)


def picture(learner: Learner, problem: stim.Neurostimulation, plain: dict, learned: dict, site: str) -> None:
    """Draws one new patient's true response, and what is expected of it before and after ten trials."""
    data = problem.task(site, "test", 0, 0).support
    paths = [learner.adaptation_path(state, data, 10) for state in (plain, learned)]
    images = [("nothing learned, 10 trials", paths[0][10], "tried"), ("learned prior, no trial", paths[1][0], ""),
              ("learned prior, 10 trials", paths[1][10], "tried")]  # fmt: skip
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.4), layout="constrained", sharey=True)
    truth = data["responses"][0].reshape(10, 10, 5).permute(0, 2, 1).reshape(10, 50)
    axes[0].imshow(truth, vmin=-1, vmax=1, cmap="RdBu", aspect="auto", origin="lower")
    axes[0].set_title("true response", fontsize=9)
    for axis, (name, own, key) in zip(axes[1:], images, strict=True):
        axis.imshow(problem.picture(own, data)[::8, ::8], vmin=0, vmax=1, cmap="RdBu", aspect="auto", origin="lower")
        for setting in own[key].tolist() if key else ():
            axis.plot(setting % 5 * 10 + setting // 5 % 10, setting // 50, "k.", markersize=4)
        axis.set_title(name, fontsize=9)
    for axis in axes:
        axis.set_xticks([5, 15, 25, 35, 45], [f"c{k}" for k in range(1, 6)])
        axis.set_xlabel("contact, frequency in it")
    axes[0].set_ylabel("amplitude")
    figure.savefig(Path(__file__).parent / "posterior.png", dpi=80)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
