"""Commands that take sites out of finished runs: forget, verify, values."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from fedmeta.cli.application import Overrides, Quiet, app
from fedmeta.cli.reading import AllowedCode
from fedmeta.cli.training import RuntimeName
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Tracking

RunName = Annotated[
    str, typer.Argument(help="A finished run's folder, that folder's name, or its MLflow id.", show_default=False)
]


@app.command()
def forget(
    site: Annotated[str, typer.Argument(help="The site's name.", show_default=False)],
    run: RunName,
    out: Annotated[Path | None, typer.Option(help="The certificate; in the new run's folder if left out.")] = None,
    runtime: Annotated[RuntimeName, typer.Option(help="local or ray.")] = RuntimeName.LOCAL,
    code: AllowedCode = None,
    as_json: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
    quiet: Quiet = False,
) -> None:
    """Trains a finished run again without one of its sites, and writes a certificate that this was done.

    The run's data must be readable here, as in simulation. FEDMETA_SIGNING_KEY names the key that signs.
    """
    from fedmeta import signing
    from fedmeta.cli import live, tables
    from fedmeta.trust import allow_code
    from fedmeta.unlearning import retrain

    if runtime == RuntimeName.DEPLOYMENT:
        raise FedmetaError(
            "--runtime deployment: a federation's server has its runs; take the site's node away and run the "
            f'experiment there with --set data.without=["{site}"] (docs/forget.md)'
        )
    root, allowed = Path(Tracking().folder), allow_code(code or [])
    experiment, state, _ = retrain.finished_run(run, root, allowed)
    with live.progress(retrain.without_site(experiment, state, site), quiet=quiet) as report:
        done = retrain.forget(site, run, root, code=allowed, runtime=runtime.value, out=out, report=report)
    found = done.certificate
    if not quiet:
        tables.results(done.result.summary, experiment)
        rounds = f"in {found.rounds_with_site} rounds" if found.rounds_with_site >= 0 else "in rounds it did not count"
        print(f'"{site}", a {found.kind} site, had taken part {rounds} of run {found.run}')
        print(f"state with it {found.run_state[:16]}, without it {found.state[:16]}: {done.result.folder}")
        if not found.repeatable:
            print(
                "not repeatable: noise for privacy makes every run another one; the certificate cannot be trained again"
            )
        if not os.environ.get(signing.SIGNING_KEY):
            print(f"not signed: {signing.SIGNING_KEY} names no key, so that anyone could have written the certificate")
        print(done.path)
    if as_json:
        print(json.dumps({"certificate": str(done.path), "state": found.state, "summary": done.result.summary}))


@app.command()
def verify(
    certificate: Annotated[Path, typer.Argument(help="What fedmeta forget wrote.", show_default=False)],
    run: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", help="A run's folder whose state is to be the certified one; may be repeated."),
    ] = None,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Train the run without the site again, and compare bit for bit.")
    ] = False,
    key: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Public keys, one of which must have signed: signing.pub."),
    ] = None,
    code: AllowedCode = None,
    quiet: Quiet = False,
) -> None:
    """Verifies the certificate of a forgotten site; what was not looked at is listed too."""
    from fedmeta.cli import live
    from fedmeta.experiment import Experiment
    from fedmeta.signing import VERIFY_KEY
    from fedmeta.trust import allow_code
    from fedmeta.unlearning import verify as verify_certificate

    if key:
        os.environ[VERIFY_KEY] = str(key)
    with live.progress(Experiment(), quiet=quiet or not retrain) as report:
        found = verify_certificate(certificate, run or [], retrain=retrain, code=allow_code(code or []), report=report)
    print(f"signature     {found.signature}")
    for line in found.checked:
        print(f"ok            {line}")
    for line in found.unchecked:
        print(f"not verified  {line}")


@app.command()
def values(
    run: RunName,
    pairs: Annotated[
        int,
        typer.Option(min=0, help="Orders of sites for Shapley values, each with its reverse; 0 = leave-one-out alone."),
    ] = 4,
    workers: Annotated[int, typer.Option(min=1, help="Runs at once, a process and a thread each.")] = 2,
    seconds: Annotated[float, typer.Option(min=0, help="After so long no further pair is begun; 0 = no limit.")] = 0.0,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the values as JSON; in the run's folder.")] = None,
    code: AllowedCode = None,
    as_json: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
    quiet: Quiet = False,
) -> None:
    """Shows what each training site is worth to a finished run: leave-one-out, and Shapley values with intervals.

    Each value takes runs on some of the sites: the run's data must be readable here.
    """
    import sys

    from fedmeta.cli import tables
    from fedmeta.files import write_atomic
    from fedmeta.trust import allow_code
    from fedmeta.unlearning.retrain import finished_run
    from fedmeta.unlearning.values import FILE, site_values

    def report(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr)

    root, allowed = Path(Tracking().folder), allow_code(code or [])
    _, _, folder = finished_run(run, root, allowed)
    found = site_values(
        run, root, pairs=pairs, workers=workers, seconds=seconds, overrides=overrides or [], code=allowed, report=report
    )
    path = out or folder / FILE
    write_atomic(path, json.dumps(found.to_json(), indent=1).encode() + b"\n")
    if not quiet:
        tables.site_values(found)
        print(path)
    if as_json:
        print(json.dumps(found.to_json()))
