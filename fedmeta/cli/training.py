"""Commands that train: run, compare, tune."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedmeta.cli.application import File, Overrides, Quiet, app
from fedmeta.experiment import load_experiment


class SamplerName(StrEnum):
    """How a search chooses the next settings."""

    GRID = "grid"
    RANDOM = "random"
    QMC = "qmc"
    TPE = "tpe"
    GP = "gp"
    CMAES = "cmaes"


class PrunerName(StrEnum):
    """How a search stops trials early."""

    MEDIAN = "median"
    HYPERBAND = "hyperband"
    NONE = "none"


COMPARED = ("local", "fedavg", "fedavg-ft", "maml")
"""What `compare` compares by default: a random start, one solution for all without and with adaptation, and a learned
start; of an own problem also the average of the sites' own solutions, which is hard to beat there."""


class RuntimeName(StrEnum):
    """Where a run may happen."""

    LOCAL = "local"
    RAY = "ray"
    DEPLOYMENT = "deployment"


@app.command()
def run(
    file: File,
    overrides: Overrides = None,
    runtime: Annotated[
        RuntimeName,
        typer.Option(
            help="local: all in this process; ray: Flower's simulation; deployment: the SuperLink of FEDMETA_SUPERLINK."
        ),
    ] = RuntimeName.LOCAL,
    resume: Annotated[
        str | None,
        typer.Option(metavar="RUN|auto", help="Resume a run: its folder's name, its MLflow id, or the newest one."),
    ] = None,
    start: Annotated[
        str,
        typer.Option(
            "--from", metavar="RUN", help="Start from an earlier run's meta-state, as far as it fits (model.start)."
        ),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
    quiet: Quiet = False,
) -> None:
    """Runs an experiment and shows what personalisation does for new sites and training sites."""
    from fedmeta.cli import live, tables
    from fedmeta.runtime import run as run_experiment

    experiment = load_experiment(file, [*(overrides or []), *([f"model.start={start}"] if start else [])])
    with live.progress(experiment, quiet=quiet) as report:
        result = run_experiment(experiment, runtime=runtime.value, resume=resume, report=report)
    if not quiet:
        tables.results(result.summary, experiment)
    if as_json:
        print(json.dumps(result.summary))


@app.command()
def compare(
    file: File,
    learners: Annotated[
        str,
        typer.Option(
            help="Which learners, separated by commas.",
            show_default=f"{','.join(COMPARED)}; and average for own problems",
        ),
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, starting at runtime.seed.")] = 3,
    tune: Annotated[
        int, typer.Option(min=0, metavar="N", help="Settings to try for each learner first, on validation sites.")
    ] = 0,
    overrides: Overrides = None,
    runtime: Annotated[RuntimeName, typer.Option(help="As for run.")] = RuntimeName.LOCAL,
    out: Annotated[Path | None, typer.Option(help="Where to write comparison.md and comparison.json too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
    quiet: Quiet = False,
) -> None:
    """Runs several learners on the same sites with several seeds, and shows which serves new sites best.

    Interrupted, the same command resumes where it stopped.
    """
    from fedmeta.cli import live, tables
    from fedmeta.search import comparison_report
    from fedmeta.search.compare import compare as compare_learners

    experiment = load_experiment(file, overrides or [])
    usual = COMPARED if experiment.on_rows else (*COMPARED, "average")
    names = [name.strip() for name in learners.split(",") if name.strip()] if learners else list(usual)
    with live.several(experiment, quiet=quiet) as report:
        found = compare_learners(experiment, names, seeds, tune=tune, runtime=runtime.value, report=report)
    if not quiet:
        tables.comparison(found)
    if out:
        comparison_report.write(found, out)
    if as_json:
        print(comparison_report.to_json(found))


@app.command()
def tune(
    file: File,
    trials: Annotated[int, typer.Option(min=2, help="How many settings to try.")] = 40,
    sampler: Annotated[SamplerName, typer.Option(help="How the next settings are chosen.")] = SamplerName.TPE,
    over: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=LOW:HIGH[:log]|KEY=VALUE,...",
            help="What to vary; may be repeated. Without it: the inner rate, the server's, and the learner's weights.",
        ),
    ] = None,
    pruner: Annotated[PrunerName, typer.Option(help="How trials that do badly are stopped early.")] = PrunerName.MEDIAN,
    workers: Annotated[int, typer.Option(min=1, help="How many trials run in parallel.")] = 1,
    final_seeds: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="SEEDS",
            help="Afterwards compare the best trial with the baseline on the new sites, using SEEDS seeds.",
        ),
    ] = 0,
    overrides: Overrides = None,
    runtime: Annotated[RuntimeName, typer.Option(help="As for run; local or ray.")] = RuntimeName.LOCAL,
    out: Annotated[Path | None, typer.Option(help="Where to write the results and best.toml too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
    quiet: Quiet = False,
) -> None:
    """Searches for settings of an experiment, scored on validation sites; new sites take no part.

    Interrupted, the same command resumes where it stopped; with more trials it continues. best.toml is ready for
    fedmeta run.
    """
    from fedmeta.cli import live, tables
    from fedmeta.search import optimize, search_report, space
    from fedmeta.search.final_evaluation import FinalEvaluation, evaluate_on_new_sites
    from fedmeta.search.results import StudyResult
    from fedmeta.search.study import SearchConfig

    experiment = load_experiment(file, overrides or []).absolute()
    varied = space.parse(over, experiment) if over else space.default_space(experiment)
    config = SearchConfig(
        experiment, varied, trials, sampler.value, pruner.value, experiment.runtime.seed, workers, runtime.value
    )
    with live.trials(config, quiet=quiet) as on_trial, live.several(experiment, quiet=quiet) as progress:

        def final(result: StudyResult) -> FinalEvaluation:
            return evaluate_on_new_sites(
                result.experiment, experiment, final_seeds, config.folder, config.runtime, progress
            )

        result = optimize.tune(config, on_trial, final if final_seeds else None)
    if not quiet:
        tables.search(result)
    if out:
        search_report.write(result, out)
    if as_json:
        print(search_report.to_json(result))
