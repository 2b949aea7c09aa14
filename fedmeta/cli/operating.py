"""Commands around runs: ui, sync, certs, flower."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmeta.cli.application import Overrides, app
from fedmeta.errors import FedmetaError
from fedmeta.experiment import UNTRACKED, Experiment, load_experiment


@app.command()
def ui(
    file: Annotated[Path | None, typer.Argument(help="An experiment whose store to open.", show_default=False)] = None,
    overrides: Overrides = None,
    uri: Annotated[str, typer.Option(help="The MLflow store, in place of the experiment's.")] = "",
    port: Annotated[int, typer.Option(help="Where to serve; 0 = a free port.")] = 0,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = False,
    data: Annotated[
        str, typer.Option(metavar="NAME", help="Show runs on this data set alone; the experiment's if a file is given.")
    ] = "",
) -> None:
    """Opens the MLflow UI on the runs of an experiment, the best score of new sites first. Ctrl-C ends it."""
    from fedmeta.tracking.description import data_name
    from fedmeta.tracking.ui import ui as serve

    experiment = load_experiment(file, overrides or []) if file else Experiment().with_overrides(overrides or [])
    chosen = uri or experiment.absolute().tracking.uri
    if chosen == UNTRACKED:
        raise FedmetaError('[tracking] uri = "none": such runs are not tracked, and there is nothing to open')
    shown = data or (data_name(experiment.params()) if file else "")
    serve(chosen, experiment.tracking.experiment, port or None, browser, shown)


@app.command()
def sync(
    folder: Annotated[
        Path | None, typer.Argument(help="A run's folder, or the folder of all runs.", show_default=False)
    ] = None,
    uri: Annotated[str, typer.Option(help="The MLflow store, in place of the one that each run names.")] = "",
) -> None:
    """Sends to MLflow what runs could not send while it was away. May be repeated; nothing is logged twice."""
    from fedmeta.tracking.events import sync as send

    left = 0
    for sent in send(folder or Path(Experiment().tracking.folder), uri):
        print(f"{sent.folder}: {sent.arrived} events sent, {sent.left} left")
        left += sent.left
    if left:
        raise FedmetaError(f"the store did not take {left} events; try again later")


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
    renew: Annotated[
        bool,
        typer.Option("--renew", help="New certificates for all that are in the folder (or each --site); keys stay."),
    ] = False,
    revoke: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A site whose certificates are taken back; may be repeated."),
    ] = None,
) -> None:
    """Makes a federation's own authority, the server's certificate and each site's keys; adds, renews and revokes.

    Without an option but --out it lists how many days each certificate is still valid.
    """
    from fedmeta.certs import make_certs, validities
    from fedmeta.certs import revoke as take_back

    servers = [name.strip() for names in server or [] for name in names.split(",")]
    if revoke:
        for path in take_back(out, revoke):
            print(path)
        names = ", ".join(revoke)
        print(f"the gate must have this file; then unregister the node of {names}: fedmeta flower supernode list")
    elif servers or site or renew or not out.is_dir():
        for path in make_certs(out, servers, site or [], force=force, renew=renew):
            print(path)
        return
    for found in validities(out):
        print(found.text)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def flower(context: typer.Context) -> int:
    """Runs Flower's own command line (flwr) against the SuperLink of FEDMETA_SUPERLINK: list, log, stop, supernode."""
    from fedmeta.runtime.deployment import flower as run_flower

    return run_flower(context.args)
