"""The deployment runtime: a run is submitted to a SuperLink that others started, and its result read from MLflow.

Three environment variables hold where things are, since an experiment is the same wherever it runs:

    FEDMETA_SUPERLINK           HOST:PORT of the SuperLink; 127.0.0.1:8000 where not set
    FEDMETA_ROOT_CERTIFICATES   the federation's ca.crt; or "none" for plain text, which is reported each time
    FEDMETA_TRACKING_URI        the MLflow store as seen from here, in place of the experiment's `tracking.uri`

The ServerApp runs where the SuperLink's operator put it, has its own FEDMETA_TRACKING_URI there, and prints its
progress, which comes back through Flower's log. MLflow's run status is the only indicator of success.
"""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedmeta.errors import FedmetaError
from fedmeta.experiment import UNTRACKED, Experiment
from fedmeta.launch import LogReader, tracked
from fedmeta.progress import ProgressCallback
from fedmeta.runtime.superlink import CONNECTION, environment, keep, last_log_line, write_app, write_run_config

SUPERLINK, ROOT_CERTIFICATES = "FEDMETA_SUPERLINK", "FEDMETA_ROOT_CERTIFICATES"
DEFAULT_SUPERLINK = "127.0.0.1:8000"
PLAIN_TEXT = "none"

_TLS_S = 3.0
_SUBMIT_S, _POLL_S, _AGAIN_S = 120.0, 0.5, 5.0
_LOST = 12
"""After so many tries in a row to reach the SuperLink again, the submitter gives up watching."""


def run(experiment: Experiment, resume: str | None, report: ProgressCallback) -> tuple[dict[str, Any], Path]:
    """Submits an experiment, watches it, and fetches its result.

    Args:
        experiment: The run's description; its paths are those of the server's machine.
        resume: A run to resume, as the server knows it; "auto" = its newest unfinished one of this experiment.
        report: Takes progress.

    Returns:
        The summary, and the folder of this machine that the run's files were fetched into.

    Raises:
        FedmetaError: The SuperLink or the store cannot be reached, or the run failed.
        KeyboardInterrupt: The user stopped it; the SuperLink was asked to stop the run.
    """
    # MLflow and all that it needs take seconds to import, and `flower` needs none of it.
    from fedmeta.tracking.mlflow_client import FINISHED, fetch_run, status_of

    uri = tracked(experiment).absolute().tracking.uri
    if uri == UNTRACKED:
        raise FedmetaError('tracking.uri = "none": the result of a deployed run comes back through MLflow')
    with _flower() as (work, env):
        app = write_app(work / "app")
        config = write_run_config(work / "run.toml", experiment.to_toml(), resume or "")
        number = _submit([str(app), CONNECTION, "--run-config", str(config), "--format", "json"], env)
        try:
            run_id, last_line = _watch(number, env, work / "log.txt", report)
        except KeyboardInterrupt:
            _call(["stop", number, CONNECTION], env)
            raise
    if not run_id:
        raise FedmetaError(last_line or f"run {number} ended before it began; see: fedmeta flower log {number}")
    if status_of(uri, run_id) != FINISHED:
        why = last_line or f"its server ended without output; see: fedmeta flower log {number}"
        resume = f"; to resume: --resume {run_id}" if experiment.runtime.checkpoint_every else ""
        raise FedmetaError(f"run {number} failed (in MLflow {run_id}): {why}{resume}")
    folder = Path(experiment.tracking.folder) / run_id
    return fetch_run(uri, run_id, folder), folder


def flower(arguments: Sequence[str]) -> int:
    """Runs Flower's own command line against the federation's SuperLink; returns its exit code."""
    with _flower() as (_, env):
        return subprocess.run(["flwr", *arguments], env=env, check=False).returncode


def connection() -> str:
    """Returns Flower's configuration of the SuperLink that the environment names.

    Raises:
        FedmetaError: The root certificate is not given, or not there.
    """
    address = os.environ.get(SUPERLINK) or DEFAULT_SUPERLINK
    if not re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/\"\\]+):[0-9]{1,5}", address):
        raise FedmetaError(f'{SUPERLINK} = "{address}": give HOST:PORT, without a scheme')
    certificate = os.environ.get(ROOT_CERTIFICATES, "")
    if certificate == PLAIN_TEXT:
        print(f"fedmeta: WARNING: plain text to {address}: anyone on the network can read it", file=sys.stderr)
        security = "insecure = true"
    elif not certificate:
        raise FedmetaError(f'{ROOT_CERTIFICATES} is not set: name the federation\'s ca.crt ("none" = plain text)')
    elif not Path(certificate).is_file():
        raise FedmetaError(f"{ROOT_CERTIFICATES}: {certificate}: no such file")
    else:
        security = f"root-certificates = {json.dumps(str(Path(certificate).absolute()))}"
        if warning := expiry_warning(address, certificate):
            print(f"fedmeta: {warning}", file=sys.stderr)
    head = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
    return f'{head}address = "{address}"\n{security}\n'


def expiry_warning(address: str, authority: str) -> str:
    """Returns a line where the SuperLink's certificate or its authority's ends within 30 days; empty otherwise.

    A SuperLink that does not answer is reported by what is asked of it next.
    """
    from cryptography.x509 import load_der_x509_certificate

    from fedmeta.certs import WARN_DAYS, validities

    host, _, port = address.rpartition(":")
    try:
        context = ssl.create_default_context(cafile=authority)
        with (
            socket.create_connection((host.strip("[]"), int(port)), timeout=_TLS_S) as plain,
            context.wrap_socket(plain, server_hostname=host.strip("[]")) as wrapped,
        ):
            shown = load_der_x509_certificate(wrapped.getpeercert(binary_form=True) or b"")
    except (OSError, ValueError):
        return ""
    days = min(
        (shown.not_valid_after_utc - datetime.now(UTC)).days, *(found.days for found in validities(Path(authority)))
    )
    if days >= WARN_DAYS:
        return ""
    return f"WARNING: the certificate of the SuperLink at {address}, or its authority's, ends in {days} days: renew it"


@contextmanager
def _flower() -> Iterator[tuple[Path, dict[str, str]]]:
    """Gives a working folder, and the environment in which Flower's commands reach the SuperLink; both end."""
    text = connection()
    with tempfile.TemporaryDirectory(prefix="fedmeta-") as name:
        home = Path(name, "flwr")
        home.mkdir()
        (home / "config.toml").write_text(text, encoding="utf-8")
        yield Path(name), environment(home, {})


def _call(arguments: Sequence[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = ["flwr", *arguments]
    return subprocess.run(command, env=env, check=False, text=True, capture_output=True, timeout=_SUBMIT_S)


def _submit(arguments: Sequence[str], env: dict[str, str]) -> str:
    """Returns the number that Flower gave the run."""
    address = os.environ.get(SUPERLINK) or DEFAULT_SUPERLINK
    try:
        answer = _call(["run", *arguments], env)
    except subprocess.TimeoutExpired:
        raise FedmetaError(f"the SuperLink at {address} did not take the run within {_SUBMIT_S:.0f} s") from None
    found = re.search(r'"run-id":\s*"?(\d+)', answer.stdout)
    if answer.returncode or not found:
        words = " ".join((answer.stdout + answer.stderr).split())
        given = re.search(r'"error-message":\s*"(.*?)"', words)
        raise FedmetaError(f"the SuperLink at {address} did not take the run: {(given[1] if given else words)[-300:]}")
    return found[1]


def _watch(number: str, env: dict[str, str], log: Path, report: ProgressCallback) -> tuple[str, str]:
    """Passes on the run's progress until Flower reports its end; returns its MLflow id and its last line."""
    run_id, error, lost = "", "", 0
    seen: set[str] = set()
    reader = LogReader()
    while lost < _LOST:
        log.write_bytes(b"")
        with keep(["flwr", "log", number, CONNECTION, "--stream"], env, log) as stream:
            for line in _lines(stream, log):
                lost = 0
                found = reader.read(line)
                if isinstance(found, str):
                    error = found
                elif found and line not in seen:
                    seen.add(line)
                    run_id = found.run_id or run_id
                    report(found)
            if stream.returncode == 0:
                return run_id, error
        lost += 1
        time.sleep(_AGAIN_S)
    raise FedmetaError(
        f"lost the SuperLink while run {number} went on ({last_log_line(log)}); look in MLflow for {run_id}"
    )


def _lines(process: subprocess.Popen[bytes], log: Path) -> Iterator[str]:
    """Yields a log's whole lines as they come, until the process that writes it has ended."""
    with log.open("rb") as file:
        rest = b""
        while True:
            ended = process.poll() is not None
            *lines, rest = (rest + file.read()).split(b"\n")
            yield from (line.decode(errors="replace") for line in lines)
            if ended:
                return
            time.sleep(_POLL_S)
