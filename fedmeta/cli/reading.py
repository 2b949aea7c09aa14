"""Commands that look at sites and at finished runs: sites, init, check, adapt, watch, predict, report, landscape."""

from __future__ import annotations

import json
import os
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedmeta.cli.application import File, Overrides, app
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Tracking, default_uri, load_experiment
from fedmeta.text import visible

AllowedCode = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PACKAGE", help="A package or module whose code the run may name; may be repeated. None by default."
    ),
]
DEFAULT_STORE = f"MLFLOW_TRACKING_URI, or {Tracking().uri}"


@app.command()
def sites(
    file: File,
    overrides: Overrides = None,
    node_config: Annotated[
        str,
        typer.Option(metavar="CONFIG", help='Show what a node with this config would send: site="NAME" data="FILE".'),
    ] = "",
    certs: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", help="With --node-config: show how long certificates in a folder are valid."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines, one per site or message.")] = False,
) -> None:
    """Shows an experiment's sites and columns: rows, classes, missing values, scales, and what is probably not meant.

    With --node-config it shows, at a site and without sending anything, the site's policy and every message that its
    node would send.
    """
    from fedmeta.cli import tables
    from fedmeta.data import load
    from fedmeta.data.findings import class_counts, findings, summarize_columns, task_reason
    from fedmeta.data.summary import summarize_sites

    experiment = load_experiment(file, overrides or [])
    if node_config:
        from fedmeta.runtime.dry_run import dry_run, format_messages, granted

        # Where the messages are for a program, what is for people goes beside them.
        aside = sys.stderr if as_json else sys.stdout
        print("policy of this site:", *(f"    {line}" for line in granted(node_config)), sep="\n", file=aside)
        for folder in certs or []:
            from fedmeta.certs import validities

            print("certificates:", *(f"    {found.text}" for found in validities(folder)), sep="\n", file=aside)
        print(format_messages(dry_run(experiment, node_config), as_json))
        return
    population = load(experiment.data)
    frame = summarize_sites(population, experiment.data, experiment.runtime.seed)
    notes = [*getattr(population, "notes", ()), *findings(population, experiment.data)]
    if as_json:
        print(frame.to_json(orient="records", lines=True), end="")
        for note in notes:
            print(f"note  {note}", file=sys.stderr)
        return
    tables.sites(frame)
    tables.columns(summarize_columns(population), task_reason(population, experiment.data), class_counts(population))
    for note in notes:
        print(f"note  {visible(note)}")


@app.command()
def init(
    path: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER|FILE", help="A folder with a table per site, one table of all sites, or an npz file."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The experiment to write.")] = Path("experiment.toml"),
    label: Annotated[str, typer.Option(metavar="COLUMN", help="The label's column; looked for if left out.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Looks at tables and writes a commented experiment that runs on them; reports what is wrong with the tables."""
    from fedmeta.data import load
    from fedmeta.data.findings import findings
    from fedmeta.data.propose import propose, to_toml

    if out.exists() and not force:
        raise FedmetaError(f"{out} is there already: name another file with --out, or write over it with --force")
    text = to_toml(propose(path, label))
    out.write_text(text, encoding="utf-8")
    print(text)
    print(f"written to {out}")
    experiment = load_experiment(out, [])
    try:
        population = load(experiment.data)
    except FedmetaError as error:
        raise FedmetaError(f"{out} is written; before it runs, mend the tables: {error}") from None
    for note in (*getattr(population, "notes", ()), *findings(population, experiment.data)):
        print(f"note  {visible(note)}")
    print(f"next  fedmeta run {shlex.quote(str(out))}")


@app.command()
def check(
    file: File,
    overrides: Overrides = None,
) -> None:
    """Checks an experiment's problem, model and learner on a few sites, against finite differences in float64."""
    from fedmeta.runtime.checking import check_experiment

    found = check_experiment(load_experiment(file, overrides or []))
    for line in found.passed:
        print(f"ok            {line}")
    for line in found.skipped:
        print(f"not verified  {line}")


class Use(StrEnum):
    """Which model a site gets."""

    ADVICE = "advice"
    GLOBAL = "global"
    PERSONAL = "personal"


@app.command()
def adapt(
    run: Annotated[
        str,
        typer.Argument(
            help="A run's folder or checkpoint, its MLflow id, or models:/NAME/VERSION.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to make for the site's model.")],
    data: Annotated[
        str,
        typer.Option(metavar="FILE", help="The site's labelled rows (.csv, .parquet, .npz), or an own problem's file."),
    ] = "",
    site: Annotated[
        str,
        typer.Option(metavar="NAME", help="Of an own problem: the site's name, or a site of its task source."),
    ] = "",
    test: Annotated[
        str, typer.Option(metavar="FILE", help="Further rows of the site, which only score the result.")
    ] = "",
    missing: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="A text that means a missing value in the file; may be repeated."),
    ] = None,
    use: Annotated[
        Use, typer.Option(help="The model to write: as advised, or the global or the personalized one.")
    ] = Use.ADVICE,
    uri: Annotated[str, typer.Option(help="The MLflow store that knows the run.", show_default=DEFAULT_STORE)] = "",
    code: AllowedCode = None,
    key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Public keys, one of which must have signed the start: signing.pub."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
) -> None:
    """Adapts a finished run to a new site's rows: its model, an honest estimate, and advice whether to use it.

    Of an own problem: the site's adapted parameters, and its scores before and after. Nothing leaves this machine.
    """
    from fedmeta.adapt import adaptation, locate, own_problem, writing
    from fedmeta.cli import adapt_output
    from fedmeta.signing import VERIFY_KEY
    from fedmeta.trust import allow_code

    if key:
        os.environ[VERIFY_KEY] = str(key)
    writing.check_folder(out)
    start = locate.find_start(run, Path(Tracking().folder), uri or default_uri(), allow_code(code or []))
    if not start.form.on_rows:
        solved = own_problem.adapt_task(start, data, site)
        written = own_problem.write(solved, out)
        adapt_output.show_solved(solved, written)
        if as_json:
            print(json.dumps(solved.summary() | {"out": str(out), "files": written.files}))
        return
    if not data or site:
        raise FedmetaError("the run's data are rows: give the site's file with --data FILE, and no --site")
    with adapt_output.progress() as report:
        adapted = adaptation.adapt(start, data, test, report, use.value, missing or [])
    written = writing.write(adapted, out)
    adapt_output.show(adapted, written)
    if as_json:
        found = adapted.summary() | {"out": str(out), "files": written.files}
        print(json.dumps(found | {"onnx_difference": written.onnx_difference}))


@app.command()
def watch(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What fedmeta adapt --out made.", show_default=False)],
    data: Annotated[
        str,
        typer.Option(metavar="FILE", help="Labelled rows in time that the model has not seen (.csv, .parquet, .npz)."),
    ],
    rate: Annotated[float, typer.Option(help="Probability of a false alarm on the whole file, at most.")] = 0.01,
    missing: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="A text that means a missing value in the file; may be repeated."),
    ] = None,
    code: AllowedCode = None,
    as_json: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
) -> None:
    """Watches a site's rows with its model, and reports when to re-adapt: an alarm with a bound on false ones.

    Rows count in the file's order. Nothing leaves this machine, and the model stays as it is.
    """
    from fedmeta.adapt import prediction
    from fedmeta.stream.watching import watch_file
    from fedmeta.trust import allow_code

    model, notes = prediction.read_model(folder, allow_code(code or []))
    found = watch_file(model, data, rate, missing or [])
    for note in (*notes, *found.notes):
        print(f"note  {visible(note)}", file=sys.stderr)
    print(found.advice, file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps(found.summary()))


@app.command()
def predict(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="What fedmeta adapt --out made, or a run's folder.", show_default=False),
    ],
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE", help="Rows without labels (.csv, .tsv, .parquet, .npz); - for the standard input."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write: .csv or .parquet; stdout if left out.")
    ] = None,
    missing: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="A text that means a missing value in the file; may be repeated."),
    ] = None,
    code: AllowedCode = None,
    key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Public keys, one of which must have signed the model: signing.pub."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
) -> None:
    """Predicts for the rows of a file: class and probabilities, or a number, and a warning of rows that lie far.

    Columns go by their names. Nothing leaves this machine.
    """
    from fedmeta.adapt import prediction, problem_prediction
    from fedmeta.signing import VERIFY_KEY
    from fedmeta.trust import allow_code

    if key:
        os.environ[VERIFY_KEY] = str(key)
    if out:
        prediction.check_out(out)
    allowed = allow_code(code or [])
    notes: tuple[str, ...] = ()
    if solved := problem_prediction.read_solved(folder, allowed):
        found = problem_prediction.predict_solved(solved, data, missing or [])
    else:
        model, notes = prediction.read_model(folder, allowed)
        found = prediction.predict(model, data, missing or [], prediction.read_sets(folder, model))
    if out:
        prediction.write_table(found.table, out)
    else:
        found.table.to_csv(sys.stdout, index=False)
    warnings = [f"{found.far} of {len(found.table)} rows lie far from what the model has seen: see warning"]
    notes = (*notes, *found.notes, *(warnings if found.far else []))
    for note in notes:
        print(f"note  {visible(note)}", file=sys.stderr)
    if as_json:
        print(
            json.dumps({"rows": len(found.table), "far": found.far, "notes": notes, "out": str(out) if out else None})
        )


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
    export: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write figures as SVG and PDF, tables as CSV and LaTeX, and no page."),
    ] = None,
    uri: Annotated[str, typer.Option(help="The MLflow store that knows the run.", show_default=DEFAULT_STORE)] = "",
) -> None:
    """Writes one page about a run, or about several runs: HTML that needs no network, Markdown, LaTeX, tables as CSV.

    RUN is a run's folder, checkpoint or MLflow id, or a comparison's folder or MLflow id; several runs are compared.
    """
    from fedmeta import report as pages

    if export and out:
        raise FedmetaError("--out is the page's folder and --export that of files for a paper: give one of them")
    root, store = Path(Tracking().folder), uri or default_uri()
    for path in pages.export(runs, export, root, store) if export else pages.write(runs, out, root, store):
        print(path)


@app.command()
def landscape(
    run: Annotated[
        str, typer.Argument(help="A run's folder, that folder's name, or its MLflow id.", show_default=False)
    ],
    sites: Annotated[int, typer.Option(min=1, help="How many training sites' tasks make the objective.")] = 16,
    steps: Annotated[int, typer.Option(min=2, help="Lanczos steps from each random start.")] = 60,
    probes: Annotated[int, typer.Option(min=1, help="Random starts.")] = 4,
    out: Annotated[Path | None, typer.Option(help="The folder for it; in the run's own if left out.")] = None,
    uri: Annotated[str, typer.Option(help="The MLflow store that knows the run.", show_default=DEFAULT_STORE)] = "",
    code: AllowedCode = None,
    as_json: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
) -> None:
    """Measures a run's meta-objective: its curvature by stochastic Lanczos quadrature, and how far sites agree.

    The run's data must be readable here, as in simulation. Figures and a picture go to the run's folder and to MLflow.
    """
    from fedmeta.cli import tables
    from fedmeta.runtime.landscape import measure
    from fedmeta.trust import allow_code

    allowed = allow_code(code or [])
    measured = measure(run, Path(Tracking().folder), uri or default_uri(), allowed, sites, steps, probes, out)
    tables.landscape(measured.figures, measured.title, measured.folder)
    if as_json:
        print(json.dumps(measured.figures))
