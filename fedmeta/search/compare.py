"""Runs every learner with every seed; before that, on request, tunes each learner with the same budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fedmeta.build import site_names, smoke_test
from fedmeta.data import draw_new_sites
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.learners import learner_class
from fedmeta.progress import ProgressCallback
from fedmeta.runtime import Result
from fedmeta.search.comparison import Comparison, build_table
from fedmeta.search.comparison_report import comparison_run, publish, write
from fedmeta.search.optimize import open_study, optimize
from fedmeta.search.privacy_spent import privacy_spent
from fedmeta.search.runs import ProgressOf, run_or_load
from fedmeta.search.space import default_space
from fedmeta.search.study import SearchConfig
from fedmeta.search.trial import Trial
from fedmeta.tracking.description import data_name


def compare(
    experiment: Experiment,
    learners: Sequence[str],
    seeds: int,
    *,
    tune: int = 0,
    runtime: str = "local",
    report: ProgressOf,
) -> Comparison:
    """Runs every learner with every seed, unless that was done before, and compares the results.

    Args:
        experiment: All but the learner's name and the seed.
        learners: The learners' names.
        seeds: How many seeds, starting at `runtime.seed`.
        tune: How many settings to try for each learner, with the first seed on validation sites; 0 = those of the
            experiment as they are.
        runtime: As for `fedmeta.runtime.run`.
        report: Returns what takes each run's progress.

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
    elif tune:
        raise FedmetaError("--tune needs --runtime local or ray; run what it finds in the deployed federation")
    # The same command, or one with more learners, seeds or settings, finds here what was done before.
    folder = Path(experiment.tracking.folder) / f"compare-{experiment.identity(6)}{'-tuned' if tune else ''}"
    with comparison_run(experiment, learners, seeds, folder, runtime) as summary:
        variants = {name: _variant(experiment, name) for name in learners}
        trials, left_out, searched = dict[str, list[Trial]](), dict[str, str](), list[Path]()
        for place, (name, variant) in enumerate(list(variants.items()) if tune else ()):

            def progress(title: str, number: int, earlier: int = place * tune) -> ProgressCallback:
                return report(f"tune {title}", earlier + number, len(learners) * tune)

            config = SearchConfig(
                variant, default_space(variant), tune, "qmc", "none", variant.runtime.seed, runtime=runtime
            )
            searched.append(config.folder)
            try:
                with open_study(config) as study:
                    found = optimize(config, study, summary.run_id if summary else "", progress=progress)
                trials[name] = found.ranked
                variants[name] = found.experiment
            except FedmetaError as error:
                left_out[name] = str(error)
                del variants[name]
        results = _run_all(variants, seeds, folder, runtime, report, left_out)
        compared = [name for name in learners if name not in left_out]
        comparison = build_table(results, compared, folder, experiment.runtime.seed, trials, left_out)
        spent = privacy_spent(experiment, [*searched, *(result.folder for result in results)])
        comparison = replace(comparison, privacy=spent)
        write(comparison, folder)
        if summary:
            publish(summary, comparison, data_name(experiment.params()))
    return comparison


def _variant(experiment: Experiment, name: str) -> Experiment:
    """Returns the experiment with another learner; the average of the sites' solutions takes one round with all."""
    one_round = ["server.rounds=1", "server.sites_per_round=0"] if name == "average" else []
    return experiment.with_overrides([f"learner.name={name}", *one_round])


def _run_all(
    variants: Mapping[str, Experiment],
    seeds: int,
    folder: Path,
    runtime: str,
    report: ProgressOf,
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
                results.append(run_or_load(seeded, folder, runtime, report(title, number, seeds * len(variants))))
            except FedmetaError as error:
                left_out[name] = str(error)
    kept = [result for result in results if result.summary["learner"] not in left_out]
    if not kept:
        raise FedmetaError(next(iter(left_out.values())))
    return kept
