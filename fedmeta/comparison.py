"""Learners beside one another: the same sites, splits and budget, several seeds, differences with intervals."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedmeta import checkpoint
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.progress import Report
from fedmeta.randomness import generator
from fedmeta.runtime import Result, result_of, run

BASELINE = "fedavg-ft"
RESAMPLES = 2000
LEVEL = 0.95
SCORES = ("global", "personalized", "worst_decile", "helped")


@dataclass(frozen=True)
class Comparison:
    """What came of several learners on the same sites.

    Attributes:
        runs: One row per run: learner, seed, run_id, rounds, wall_s, bytes_up, bytes_down, and of new sites global,
            personalized, worst_decile, helped.
        sites: The final evaluation of every run, one row per site, with learner and seed.
        table: One row per learner: means and standard deviations over seeds, and the paired difference of the
            personalized score of new sites from the baseline's, with its interval.
        baseline: What the others are held against.
        score: "accuracy" or "rmse".
        verdict: One sentence.
        folder: Where it is kept, and goes on from when it is interrupted.
    """

    runs: pd.DataFrame
    sites: pd.DataFrame
    table: pd.DataFrame
    baseline: str
    score: str
    verdict: str
    folder: Path


def compare(
    experiment: Experiment,
    learners: Sequence[str],
    seeds: int,
    *,
    runtime: str = "local",
    report: Callable[[str, int, int], Report],
) -> Comparison:
    """Runs every learner with every seed, unless that was done before, and sets the results beside one another.

    Args:
        experiment: All but the learner's name and the seed.
        learners: The learners' names.
        seeds: How many seeds, from `runtime.seed` upwards.
        runtime: As for `fedmeta.runtime.run`.
        report: Returns what takes a run's progress, given its title, its number (from 1) and the number of runs.

    Raises:
        FedmetaError: As for `fedmeta.runtime.run`; or a learner is named twice.
    """
    if len(set(learners)) != len(learners):
        raise FedmetaError(f"--learners names one twice: {', '.join(learners)}")
    experiment = experiment.absolute()
    variants = [
        experiment.with_overrides([f"learner.name={name}", f"runtime.seed={experiment.runtime.seed + offset}"])
        for offset in range(seeds)
        for name in learners
    ]
    folder = Path(experiment.tracking.folder) / f"compare-{_digest(experiment)}"
    results = []
    for number, variant in enumerate(variants, 1):
        title = f"{variant.learner.name}, seed {variant.runtime.seed}"
        results.append(_run_once(variant, folder, runtime, report(title, number, len(variants))))
    return _comparison(results, learners, folder, experiment.runtime.seed)


def _run_once(experiment: Experiment, folder: Path, runtime: str, report: Report) -> Result:
    """Returns a run's result: from an earlier, finished or interrupted, call, or from a new run."""
    name = experiment.learner.name.replace(":", ".").replace("/", ".")
    done = folder / f"{name}-{experiment.runtime.seed}.json"
    if done.exists():
        kept = json.loads(done.read_text())
        run_folder = Path(kept["folder"])
        if (run_folder / "sites.parquet").exists():
            state, _ = checkpoint.newest(run_folder)
            history = pd.read_parquet(run_folder / "sites.parquet")
            return result_of(kept["summary"], history, dict(state.meta_state), run_folder)
    try:
        checkpoint.find(Path(experiment.tracking.folder), "auto", experiment.to_toml())
        resume: str | None = "auto"
    except FedmetaError:
        resume = None
    result = run(experiment, runtime=runtime, resume=resume, report=report)
    folder.mkdir(parents=True, exist_ok=True)
    part = done.with_suffix(".part")
    part.write_text(json.dumps({"summary": result.summary, "folder": str(result.folder)}))
    part.replace(done)
    return result


def _comparison(results: Sequence[Result], learners: Sequence[str], folder: Path, seed: int) -> Comparison:
    runs = pd.DataFrame([_run_row(result.summary) for result in results])
    sites = pd.concat(
        [result.sites.assign(learner=result.summary["learner"], seed=result.summary["seed"]) for result in results],
        ignore_index=True,
    )
    score = results[0].summary["metric"]
    baseline = BASELINE if BASELINE in learners else learners[0]
    rows = []
    for learner in learners:
        own = runs[runs["learner"] == learner]
        row: dict[str, Any] = {"learner": learner, "seeds": len(own)}
        for column in SCORES:
            values = own[column].astype(float)
            row[column] = values.mean()
            row[f"{column}_sd"] = values.std(ddof=1) if len(own) > 1 else np.nan
        for column in ("rounds", "bytes_up", "bytes_down", "wall_s"):
            row[column] = own[column].mean()
        row["difference"], row["low"], row["high"] = difference(sites, learner, baseline, score, seed)
        rows.append(row)
    table = pd.DataFrame(rows).sort_values("personalized", ascending=score == "rmse", ignore_index=True)
    return Comparison(runs, sites, table, baseline, score, verdict(table, baseline, score), folder)


def _run_row(summary: Mapping[str, Any]) -> dict[str, Any]:
    new = summary["new_sites"] if summary["new_sites"]["n"] else summary["training_sites"]
    return {
        **{key: summary[key] for key in ("learner", "seed", "run_id", "rounds", "wall_s", "bytes_up", "bytes_down")},
        "sites": new["n"],
        "global": new["global"]["mean"],
        "personalized": new["personalized"]["mean"],
        "worst_decile": new["personalized"]["worst_decile"],
        "helped": new["helped"],
    }


def difference(sites: pd.DataFrame, learner: str, baseline: str, score: str, seed: int) -> tuple[float, float, float]:
    """Returns how much better a learner serves new sites than the baseline, and the 95 % interval of that.

    The difference is paired: site by site, under the same seed. The interval is the percentile bootstrap over sites
    (Efron and Tibshirani 1993, chapter 13), drawn from `seed`. Where no site is new, training sites are compared.

    Args:
        sites: As in `Comparison`.
        learner: The learner.
        baseline: The learner that it is held against.
        score: "accuracy" (higher is better) or "rmse" (lower is better).
        seed: Key of the resampling.
    """
    kind = "new" if (sites["kind"] == "new").any() else "training"
    own = sites[sites["kind"] == kind].set_index(["seed", "site"])[["learner", f"personalized_{score}"]]
    pair = [own[own["learner"] == name][f"personalized_{score}"] for name in (learner, baseline)]
    gains = (pair[0] - pair[1]).dropna().to_numpy() * (-1 if score == "rmse" else 1)
    if not len(gains):
        return np.nan, np.nan, np.nan
    draws = generator(seed, "bootstrap").integers(len(gains), size=(RESAMPLES, len(gains)))
    low, high = np.quantile(gains[draws].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(gains.mean()), float(low), float(high)


def verdict(table: pd.DataFrame, baseline: str, score: str) -> str:
    """Returns in one sentence which learner serves new sites best, and whether that is more than chance."""
    best = table.iloc[0]
    said = f"Best for new sites: {best['learner']} ({score} {best['personalized']:.3f})"
    if best["learner"] == baseline:
        return f"{said}; no other learner does better than this baseline here."
    sure = "surely" if best["low"] > 0 else "not surely"
    by = interval(best["difference"], best["low"], best["high"])
    return f"{said}, {sure} better than {baseline} ({by}, 95 % over sites)."


def markdown(comparison: Comparison) -> str:
    """Returns the verdict and the table as Markdown."""
    heads = ["learner", "seeds", "global", "personalized", "worst tenth", "helped", f"against {comparison.baseline}"]
    heads += ["rounds", "MB up", "seconds"]
    lines = [comparison.verdict, "", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for _, row in comparison.table.iterrows():
        cells = [str(row["learner"]), str(int(row["seeds"]))]
        cells += [spread(row[name], row[f"{name}_sd"]) for name in SCORES]
        cells.append(interval(row["difference"], row["low"], row["high"]))
        cells += [f"{row['rounds']:.0f}", f"{row['bytes_up'] / 1e6:.1f}", f"{row['wall_s']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def to_json(comparison: Comparison) -> str:
    """Returns the verdict, the table and the runs as one JSON object."""
    table, runs = (json.loads(frame.to_json(orient="records")) for frame in (comparison.table, comparison.runs))
    return json.dumps(
        {"verdict": comparison.verdict, "baseline": comparison.baseline, "metric": comparison.score}
        | {"table": table, "runs": runs}
    )


def write(comparison: Comparison, folder: Path) -> None:
    """Writes comparison.md, comparison.json and sites.parquet (every run's final evaluation) into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.md").write_text(markdown(comparison))
    (folder / "comparison.json").write_text(to_json(comparison) + "\n")
    comparison.sites.to_parquet(folder / "sites.parquet", index=False)


def interval(mean: float, low: float, high: float) -> str:
    """Returns a difference with its interval in words."""
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def spread(mean: float, sd: float) -> str:
    """Returns a mean with its standard deviation over seeds in words; without one where there is one seed."""
    return f"{mean:.3f}" if np.isnan(sd) else f"{mean:.3f} ± {sd:.3f}"


def _digest(experiment: Experiment) -> str:
    """Returns a name for the comparisons of an experiment: the same call, or one with more learners, finds the runs."""
    return blake2b(experiment.to_toml().encode(), digest_size=6).hexdigest()
