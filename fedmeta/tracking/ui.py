"""The MLflow UI on a store: a server of its own for a database, a link for a server that runs already."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, NamedTuple
from urllib.error import HTTPError
from urllib.parse import quote, urlencode
from urllib.request import urlopen

from fedmeta.errors import FedmetaError
from fedmeta.experiment import with_user_info
from fedmeta.tracking.experiment_page import VIEW, VIEW_TAG
from fedmeta.tracking.store import MLFLOW_DEFAULTS, checked_uri, shown, sqlite_file

LOOPBACK = "127.0.0.1"
USUAL_PORT = 5000
START_S = 120.0
ANSWER_S = 5.0
STOP_S = 10.0


class Served(NamedTuple):
    """A running MLflow server."""

    address: str
    process: "subprocess.Popen[bytes]"


def ui(uri: str, experiment: str, port: int | None = None, browser: bool = False) -> None:
    """Opens the UI and serves it until Ctrl-C; of a server that runs already it only prints the link.

    Args:
        uri: the store.
        experiment: the name of the experiment whose charts the link shows.
        port: where to serve; None takes MLflow's usual port, or another where that is taken.
        browser: whether to open the link in a browser.

    Raises:
        FedmetaError: the store is not there or cannot be used, the port is taken, or MLflow does not start.
    """
    if uri.startswith(("http://", "https://")):
        _announce(experiment_link(checked_uri(uri), experiment), browser)
        return
    try:
        with _interrupted_by_termination(), serving(uri, port) as server:
            _announce(experiment_link(server.address, experiment), browser)
            print("Ctrl-C ends it.", file=sys.stderr)
            server.process.wait()
    except KeyboardInterrupt:
        print(file=sys.stderr)
    else:
        raise FedmetaError(f'the MLflow UI on "{shown(uri)}" ended by itself; start it again')


@contextmanager
def serving(uri: str, port: int | None = None) -> Iterator[Served]:
    """Runs `mlflow server` on a database, on this machine's loopback alone.

    Yields:
        The server, once it answers.

    Raises:
        FedmetaError: as for `ui`.
    """
    file = sqlite_file(uri)
    if file is not None and not file.exists():
        raise FedmetaError(f"{file}: there is no MLflow store; `fedmeta run` makes one, `--uri` names another")
    uri = checked_uri(uri)
    port = _free_port(port)
    address = f"http://{LOOPBACK}:{port}"
    with TemporaryFile() as output:
        server = _start(uri, port, file.parent if file else Path.cwd(), output)
        try:
            _wait(server, address, uri, output)
            yield Served(address, server)
        finally:
            _stop(server)


def experiment_link(address: str, experiment: str) -> str:
    """Returns the link to an experiment's charts, the runs sorted by new-site score, or to all where there is none."""
    query = urlencode({"experiment_name": experiment}, quote_via=quote)
    try:
        with urlopen(f"{address}/api/2.0/mlflow/experiments/get-by-name?{query}", timeout=ANSWER_S) as reply:
            found = json.load(reply)["experiment"]
    except (OSError, ValueError, KeyError):
        # Absent, or behind a login that the browser knows.
        return f"{address}/#/experiments"
    # Without its type of workflow the page would open in MLflow's GenAI mode.
    view = {"workflowType": "machine_learning", "compareRunsMode": "CHART"}
    if any(tag["key"] == VIEW_TAG for tag in found.get("tags", ())):
        view["viewStateShareKey"] = VIEW
    return f"{address}/#/experiments/{found['experiment_id']}/runs?{urlencode(view)}"


def run_link(address: str, experiment_id: str, run_id: str) -> str:
    """Returns the link to a run's charts."""
    return f"{address}/#/experiments/{experiment_id}/runs/{run_id}/model-metrics?workflowType=machine_learning"


def _announce(link: str, browser: bool) -> None:
    print(link)
    sys.stdout.flush()
    if browser:
        webbrowser.open(link)


def _free_port(port: int | None) -> int:
    """Returns `port` if it is free; where it is None, the usual one or any free one."""
    for wanted in (port,) if port is not None else (USUAL_PORT, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, wanted))
            except OSError:
                continue
            number: int = probe.getsockname()[1]
            return number
    raise FedmetaError(f"port {port} is taken or not allowed; name another with --port, or none to have a free one")


def _start(uri: str, port: int, folder: Path, output: IO[bytes]) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "mlflow", "server", "--host", LOOPBACK, "--port", str(port), "--workers", "1"]
    # The address may hold a password: a command line shows it to everyone on the machine.
    env = {**MLFLOW_DEFAULTS, **os.environ, "MLFLOW_BACKEND_STORE_URI": with_user_info(uri)}
    # In a session of its own, its workers end with it and Ctrl-C reaches it through us alone.
    return subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, env=env, start_new_session=True)


def _wait(server: "subprocess.Popen[bytes]", address: str, uri: str, output: IO[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urlopen(f"{address}/health", timeout=ANSWER_S):
                return
        except HTTPError:
            break
        except OSError:
            time.sleep(0.1)
    output.seek(0)
    said = output.read().decode(errors="replace").strip().splitlines()
    raise FedmetaError(f'the MLflow UI on "{shown(uri)}" did not start: {said[-1] if said else "it said nothing"}')


def _stop(server: "subprocess.Popen[bytes]") -> None:
    for ending in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, ending)
        except ProcessLookupError:
            break
        try:
            server.wait(STOP_S)
        except subprocess.TimeoutExpired:
            continue
    server.wait()


@contextmanager
def _interrupted_by_termination() -> Iterator[None]:
    """Treats a request to terminate like Ctrl-C, so that the server does not outlive us."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
