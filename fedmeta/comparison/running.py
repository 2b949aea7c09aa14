"""Runs every learner with every seed, and before that, where it is asked for, looks for each learner's settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from fedmeta import checkpoint
from fedmeta.build import site_names, smoke_test
from fedmeta.comparison import settings
from fedmeta.comparison.page import write
from fedmeta.comparison.results import Comparison, tabulate
from fedmeta.comparison.tracked import comparison_run, publish, under
from fedmeta.data import draw_new_sites
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.learners import learner_class
from fedmeta.progress import Report
from fedmeta.runtime import Result, result_of, run
from fedmeta.tuning import with_settings

Reports = Callable[[str, int, int], Report]
"""Returns what takes a run's progress, given the run's title, its number (from 1) and the number of runs."""


def compare(
    experiment: Experiment,
    learners: Sequence[str],
    seeds: int,
    *,
    tune: int = 0,
    runtime: str = "local",
    report: Reports,
) -> Comparison:
    """Runs every learner with every seed, unless that was done before, and sets the results beside one another.

    Args:
        experiment: All but the learner's name and the seed.
        learners: The learners' names.
        seeds: How many seeds, from `runtime.seed` upwards.
        tune: How many settings to try for each learner, with the first seed on validation sites; 0 = those of the
            experiment as they are.
        runtime: As for `fedmeta.runtime.run`.
        report: Gives each run what takes its progress.

    Raises:
        FedmetaError: No learner is named, one is named twice or does not exist, the data cannot be read or the model
            does not take them: then nothing is written; or every learner failed. One that fails alone, such as one
            whose training diverges under all settings, is left out and named.
    """
    if not learners:
        raise FedmetaError("--learners names none: give at least one, such as maml")
    if len(set(learners)) != len(learners):
        raise FedmetaError(f"--learners names one twice: {', '.join(learners)}")
    for name in learners:
        learner_class(name)
    experiment = experiment.absolute()
    if runtime != "deployment":  # there the data are elsewhere
        draw_new_sites(site_names(experiment), experiment.data.new_sites, experiment.runtime.seed)
        smoke_test(experiment)
    # The same call, or one with more learners, seeds or settings, finds here what was done before.
    folder = Path(experiment.tracking.folder) / f"compare-{experiment.identity(6)}{'-tuned' if tune else ''}"
    with comparison_run(experiment, learners, seeds, folder, runtime) as summary:
        variants = {name: experiment.with_overrides([f"learner.name={name}"]) for name in learners}
        trials, left_out = {}, dict[str, str]()
        for place, (name, variant) in enumerate(list(variants.items()) if tune else ()):
            nested = under(summary, variant)

            def reports(title: str, number: int, place: int = place) -> Report:
                return report(title, place * tune + number, len(learners) * tune)

            def run_trial(trial: Experiment, report: Report) -> Result:
                return _resumed(trial, runtime, report)

            try:
                trials[name] = settings.tried(nested, tune, folder / "trials", run_trial, reports)
                variants[name] = with_settings(variant, settings.chosen(trials[name]))
            except FedmetaError as error:
                left_out[name] = str(error)
                del variants[name]
        results = _run_all(variants, seeds, folder, runtime, report, left_out)
        compared = [name for name in learners if name not in left_out]
        found = tabulate(results, compared, folder, experiment.runtime.seed, trials, left_out)
        write(found, folder)
        if summary:
            publish(summary, found)
    return found


def _run_all(
    variants: Mapping[str, Experiment],
    seeds: int,
    folder: Path,
    runtime: str,
    report: Reports,
    left_out: dict[str, str],
) -> list[Result]:
    """Returns the results of every variant with every seed; one that fails is noted in `left_out`, with all its seeds.

    Raises:
        FedmetaError: None is left; the message is the first one's.
    """
    results: list[Result] = []
    for offset in range(seeds):
        for place, (name, variant) in enumerate(variants.items(), 1):
            if name in left_out:
                continue
            seeded = variant.with_overrides([f"runtime.seed={variant.runtime.seed + offset}"])
            title, number = f"{name}, seed {seeded.runtime.seed}", offset * len(variants) + place
            try:
                results.append(run_once(seeded, folder, runtime, report(title, number, seeds * len(variants))))
            except FedmetaError as error:
                left_out[name] = str(error)
    kept = [result for result in results if result.summary["learner"] not in left_out]
    if not kept:
        raise FedmetaError(next(iter(left_out.values())))
    return kept


def run_once(experiment: Experiment, folder: Path, runtime: str, report: Report) -> Result:
    """Returns a run's result: from an earlier, finished or interrupted, call, or from a new run."""
    name = experiment.learner.name.replace(":", ".").replace("/", ".")
    done = folder / f"{name}-{experiment.runtime.seed}.json"
    if done.exists():
        kept = json.loads(done.read_text())
        run_folder = Path(kept["folder"])
        # A longer search may have found other settings since.
        if kept.get("experiment") == experiment.identity() and (run_folder / "sites.parquet").exists():
            state, _ = checkpoint.newest(run_folder)
            history = pd.read_parquet(run_folder / "sites.parquet")
            return result_of(kept["summary"], history, dict(state.meta_state), run_folder)
    result = _resumed(experiment, runtime, report)
    folder.mkdir(parents=True, exist_ok=True)
    part = done.with_suffix(".part")
    entry = {"summary": result.summary, "folder": str(result.folder), "experiment": experiment.identity()}
    part.write_text(json.dumps(entry))
    part.replace(done)
    return result


def _resumed(experiment: Experiment, runtime: str, report: Report) -> Result:
    """Runs an experiment; goes on with a run of it that was interrupted."""
    try:
        checkpoint.find(Path(experiment.tracking.folder), "auto", experiment.to_toml())
        resume: str | None = "auto"
    except FedmetaError:
        resume = None
    return run(experiment, runtime=runtime, resume=resume, report=report)
