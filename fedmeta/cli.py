"""The command line: fedmeta run | compare | sites | adapt | ui | certs."""

from __future__ import annotations

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import click
import typer

from fedmeta.errors import FedmetaError
from fedmeta.experiment import UNTRACKED, Experiment, Tracking, load_experiment

app = typer.Typer(
    help="Federated meta-learning: a start from which every site, also a new one, adapts in a few steps.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

File = Annotated[Path, typer.Argument(help="The experiment, a TOML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a key of the experiment; may be repeated."),
]

Quiet = Annotated[bool, typer.Option("--quiet", help="Show neither progress nor tables; errors are still said.")]

INTERRUPTED = 130


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
    from fedmeta import terminal, watching
    from fedmeta.runtime import run as run_experiment

    experiment = load_experiment(file, overrides or [])
    with watching.progress(experiment, quiet=quiet) as report:
        result = run_experiment(experiment, runtime=runtime.value, resume=resume, report=report)
    if not quiet:
        terminal.results(result.summary, experiment)
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
    from fedmeta import comparison, terminal, watching

    experiment = load_experiment(file, overrides or [])
    names = [name.strip() for name in learners.split(",") if name.strip()]
    with watching.several(experiment, quiet=quiet) as report:
        found = comparison.compare(experiment, names, seeds, tune=tune, runtime=runtime.value, report=report)
    if not quiet:
        terminal.comparison(found)
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


@app.command()
def sites(
    file: File,
    overrides: Overrides = None,
    node_config: Annotated[
        str,
        typer.Option(metavar="CONFIG", help='Show what a node with this config would send: site="NAME" data="FILE".'),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines, one per site or message.")] = False,
) -> None:
    """Shows an experiment's sites: rows, classes, missing values, and which of them are new.

    With --node-config it shows, at a site and without sending anything, every message that the site's node would send.
    """
    from fedmeta import terminal
    from fedmeta.data import load
    from fedmeta.data.overview import describe_sites

    experiment = load_experiment(file, overrides or [])
    if node_config:
        from fedmeta.runtime.rehearsal import rehearse, told

        print(told(rehearse(experiment, node_config), as_json))
        return
    frame = describe_sites(load(experiment.data), experiment.data, experiment.runtime.seed)
    if as_json:
        print(frame.to_json(orient="records", lines=True), end="")
    else:
        terminal.sites(frame)


@app.command()
def adapt(
    run: Annotated[
        str,
        typer.Argument(
            help="A run's folder or checkpoint, its MLflow id, or models:/NAME/VERSION.", show_default=False
        ),
    ],
    data: Annotated[str, typer.Option(metavar="FILE", help="The site's labelled rows: .csv, .parquet or .npz.")],
    out: Annotated[Path, typer.Option(help="The folder to make for the site's model.")],
    test: Annotated[str, typer.Option(metavar="FILE", help="Further rows of the site, which only judge.")] = "",
    uri: Annotated[str, typer.Option(help="The MLflow store that knows the run.")] = Tracking().uri,
    as_json: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
) -> None:
    """Adapts a finished run to a new site's rows: its model, an honest estimate, and advice whether to use it.

    Nothing leaves this machine.
    """
    from fedmeta.adapt import finding, joining, showing, writing

    writing.check_folder(out)
    start = finding.find_start(run, Path(Tracking().folder), uri)
    with showing.progress() as report:
        adapted = joining.adapt(start, data, test, report)
    written = writing.write(adapted, out)
    showing.show(adapted, written)
    if as_json:
        found = adapted.summary() | {"out": str(out), "files": written.files}
        print(json.dumps(found | {"onnx_difference": written.onnx_difference}))


@app.command()
def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="A run's folder, checkpoint or MLflow id; a comparison's folder or MLflow id; or several runs.",
            show_default=False,
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="The folder for it; in the run's own if left out.")] = None,
    uri: Annotated[str, typer.Option(help="The MLflow store that knows the run.")] = Tracking().uri,
) -> None:
    """Writes one page about a run, or about runs beside one another: HTML that needs no network, and Markdown.

    RUN is a run's folder, checkpoint or MLflow id, or a comparison's folder or MLflow id; several runs are compared.
    """
    from fedmeta.report import write

    for path in write(runs, out, Path(Tracking().folder), uri):
        print(path)


@app.command()
def ui(
    file: Annotated[Path | None, typer.Argument(help="An experiment whose store to open.", show_default=False)] = None,
    overrides: Overrides = None,
    uri: Annotated[str, typer.Option(help="The MLflow store, in place of the experiment's.")] = "",
    port: Annotated[int, typer.Option(help="Where to serve; 0 = a free port.")] = 0,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = False,
) -> None:
    """Opens the MLflow UI on the runs of an experiment, best new-site accuracy first. Ctrl-C ends it."""
    from fedmeta.tracking.ui import ui as serve

    experiment = load_experiment(file, overrides or []) if file else Experiment().with_overrides(overrides or [])
    chosen = uri or experiment.absolute().tracking.uri
    if chosen == UNTRACKED:
        raise FedmetaError('[tracking] uri = "none": such runs are not tracked, and there is nothing to open')
    serve(chosen, experiment.tracking.experiment, port or None, browser)


@app.command()
def sync(
    folder: Annotated[
        Path | None, typer.Argument(help="A run's folder, or the folder of all runs.", show_default=False)
    ] = None,
    uri: Annotated[str, typer.Option(help="The MLflow store, in place of the one that each run names.")] = "",
) -> None:
    """Sends to MLflow what runs could not send while it was away. May be repeated; nothing is logged twice."""
    from fedmeta.tracking.sync import sync as send

    left = 0
    for sent in send(folder or Path(Experiment().tracking.folder), uri):
        print(f"{sent.folder}: {sent.arrived} entries sent, {sent.left} left")
        left += sent.left
    if left:
        raise FedmetaError(f"the store did not take {left} entries; try again later")


@app.command()
def certs(
    out: Annotated[Path, typer.Option(help="The folder for keys and certificates.")] = Path("certs"),
    server: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[,NAME...]", help="Host names and IP addresses under which sites reach the server."),
    ] = None,
    site: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A site to make keys for; may be repeated.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there; never the authority.")] = False,
) -> None:
    """Makes a federation's own authority, the server's certificate and each site's keys; or adds to them."""
    from fedmeta.certs import make_certs

    servers = [name.strip() for names in server or [] for name in names.split(",")]
    for path in make_certs(out, servers, site or [], force=force):
        print(path)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def flower(context: typer.Context) -> int:
    """Runs Flower's own command line (flwr) against the SuperLink of FEDMETA_SUPERLINK: list, log, stop, supernode."""
    from fedmeta.runtime.deployment import flower as run_flower

    return run_flower(context.args)


def main() -> None:
    """Runs the command line; what the user can mend is one line on stderr and exit code 2."""
    # An experiment may name a model by import path; a script's own folder is not on the path, the user's is.
    sys.path.insert(0, os.getcwd())
    try:
        code = app(standalone_mode=False)
    except FedmetaError as error:
        _fail(str(error))
    except click.ClickException as error:
        _fail(" ".join(error.format_message().split()))
    except (KeyboardInterrupt, click.Abort):
        print("fedmeta: stopped", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> None:
    print(f"fedmeta: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(2)
