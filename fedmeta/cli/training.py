"""Commands that train: run, compare, tune."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedmeta.cli.application import File, Overrides, Quiet, app
from fedmeta.errors import FedmetaError
from fedmeta.experiment import load_experiment


class SamplerName(StrEnum):
    """Ways of searching."""

    GRID = "grid"
    RANDOM = "random"
    TPE = "tpe"
    GP = "gp"
    CMAES = "cmaes"


class PrunerName(StrEnum):
    """Ways of giving trials up."""

    MEDIAN = "median"
    HYPERBAND = "hyperband"
    NONE = "none"


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
        typer.Option(metavar="RUN|auto", help="Go on with a run: its folder's name, its MLflow id, or the newest one."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
    quiet: Quiet = False,
) -> None:
    """Runs an experiment and shows what personalisation does for new sites and training sites."""
    from fedmeta.cli import live, tables
    from fedmeta.runtime import run as run_experiment

    experiment = load_experiment(file, overrides or [])
    with live.progress(experiment, quiet=quiet) as report:
        result = run_experiment(experiment, runtime=runtime.value, resume=resume, report=report)
    if not quiet:
        tables.results(result.summary, experiment)
    if as_json:
        print(json.dumps(result.summary))


@app.command()
def compare(
    file: File,
    learners: Annotated[str, typer.Option(help="Which learners, with commas between.")] = "local,fedavg,fedavg-ft,maml",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, from the experiment's upwards.")] = 3,
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

    Interrupted, the same command goes on where it stopped.
    """
    from fedmeta import comparison
    from fedmeta.cli import live, tables

    experiment = load_experiment(file, overrides or [])
    names = [name.strip() for name in learners.split(",") if name.strip()]
    with live.several(experiment, quiet=quiet) as report:
        found = comparison.compare(experiment, names, seeds, tune=tune, runtime=runtime.value, report=report)
    if not quiet:
        tables.comparison(found)
    if out:
        comparison.write(found, out)
    if as_json:
        print(comparison.to_json(found))


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
    pruner: Annotated[
        PrunerName, typer.Option(help="Which trials are given up on their way: those worse than most others so far.")
    ] = PrunerName.MEDIAN,
    workers: Annotated[int, typer.Option(min=1, help="How many trials run side by side.")] = 1,
    judge: Annotated[
        int,
        typer.Option(min=0, metavar="SEEDS", help="Then set the best against the file's own settings on new sites."),
    ] = 0,
    compare: Annotated[
        str,
        typer.Option(metavar="SAMPLER,...", help="Give each of these ways the same trials, and show which is best."),
    ] = "",
    seeds: Annotated[int, typer.Option(min=1, help="How many searches of each way, with --compare.")] = 3,
    overrides: Overrides = None,
    runtime: Annotated[RuntimeName, typer.Option(help="As for run; local or ray.")] = RuntimeName.LOCAL,
    out: Annotated[Path | None, typer.Option(help="Where to write the results and best.toml too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
) -> None:
    """Searches for settings of an experiment, judged on validation sites; new sites take no part.

    Interrupted, the same command goes on where it stopped; with more trials, too. best.toml is ready for fedmeta run.
    """
    from fedmeta.tuning import command

    if runtime is RuntimeName.DEPLOYMENT:
        raise FedmetaError("tune runs here: --runtime local or ray; a deployed federation runs what was found")
    experiment = load_experiment(file, overrides or [])
    plan = command.plan_of(experiment, over or [], trials, sampler.value, pruner.value, workers, runtime.value)
    if compare:
        print_json = command.compare(plan, [name.strip() for name in compare.split(",") if name.strip()], seeds, out)
    else:
        print_json = command.tune(plan, judge, out)
    if as_json:
        print(print_json)
