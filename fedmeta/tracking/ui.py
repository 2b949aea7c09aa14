"""The MLflow UI on a store: `mlflow server` for a database, a link for a server that already runs."""

from __future__ import annotations

import base64
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
from tempfile import TemporaryFile
from typing import NamedTuple
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

from fedmeta.errors import FedmetaError
from fedmeta.experiment.tracking_uri import PASSWORD, USER, with_user_info, without_user_info
from fedmeta.tracking.experiment_view import VIEW, VIEWS, view_of
from fedmeta.tracking.mlflow_client import MLFLOW_DEFAULTS, checked_uri, sqlite_file

LOOPBACK = "127.0.0.1"
USUAL_PORT = 5000
START_S = 300.0
ANSWER_S = 5.0
STOP_S = 10.0


class Served(NamedTuple):
    """A running MLflow server."""

    address: str
    process: subprocess.Popen[bytes]


def ui(uri: str, experiment: str, port: int | None = None, browser: bool = False, data: str = "") -> None:
    """Serves the UI until Ctrl-C; of a server that already runs it only prints the link.

    Args:
        uri: The store.
        experiment: The name of the experiment whose charts the link shows.
        port: Where to serve; None takes MLflow's usual port, or another where that is taken.
        browser: Whether to open the link in a browser.
        data: The data set whose runs the link shows; "" = all of them.

    Raises:
        FedmetaError: The store is not there or cannot be used, the port is taken, or MLflow does not start.
    """
    if uri.startswith(("http://", "https://")):
        _announce(experiment_link(checked_uri(uri), experiment, data), browser)
        return
    # Ended from outside, this process must not leave the server running.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with serving(uri, port) as server:
            _announce(experiment_link(server.address, experiment, data), browser)
            print("Ctrl-C ends it.", file=sys.stderr)
            server.process.wait()
    except KeyboardInterrupt:
        print(file=sys.stderr)
    else:
        raise FedmetaError(f'the MLflow UI on "{without_user_info(uri)}" ended unexpectedly; start it again')
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def serving(uri: str, port: int | None = None) -> Iterator[Served]:
    """Runs `mlflow server` on a database, reachable from this machine alone.

    Yields:
        The server, once it answers.

    Raises:
        FedmetaError: As for `ui`.
    """
    file = sqlite_file(uri)
    if file is not None and not file.exists():
        raise FedmetaError(f"{file}: there is no MLflow store; `fedmeta run` makes one, `--uri` names another")
    uri = checked_uri(uri)
    port = _free_port(port)
    address = f"http://{LOOPBACK}:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", LOOPBACK, "--port", str(port), "--workers", "1"]
    # The address may hold a password, and everyone on this machine can read a command line.
    env = {**MLFLOW_DEFAULTS, **os.environ, "MLFLOW_BACKEND_STORE_URI": with_user_info(uri)}
    with TemporaryFile() as output:
        # In its own session, Ctrl-C reaches the server through this process alone, and its workers end with it.
        server = subprocess.Popen(
            command,
            cwd=file.parent if file else None,
            stdout=output,
            stderr=output,
            env=env,
            start_new_session=True,
        )
        try:
            if not _answers(server, address):
                output.seek(0)
                lines = output.read().decode(errors="replace").strip().splitlines()
                reason = lines[-1] if lines else "no output"
                raise FedmetaError(f'the MLflow UI on "{without_user_info(uri)}" did not start: {reason}')
            yield Served(address, server)
        finally:
            _stop(server)


def experiment_link(address: str, experiment: str, data: str = "", charts: bool = True) -> str:
    """Returns the link to an experiment's runs, the best first, or to all experiments where there is none.

    Args:
        address: The server.
        experiment: The experiment's name.
        data: The data set whose runs are shown, where the experiment has a view of it; "" = all runs.
        charts: Whether runs are shown as charts, or as a table.
    """
    query = urlencode({"experiment_name": experiment}, quote_via=quote)
    request = Request(f"{address}/api/2.0/mlflow/experiments/get-by-name?{query}")
    if user := os.environ.get(USER):
        login = base64.b64encode(f"{user}:{os.environ.get(PASSWORD, '')}".encode()).decode()
        request.add_header("Authorization", f"Basic {login}")
    try:
        with urlopen(request, timeout=ANSWER_S) as reply:
            found = json.load(reply)["experiment"]
    except (OSError, ValueError, KeyError):
        return f"{address}/#/experiments"
    # Without its type of workflow the page would open in MLflow's GenAI mode.
    view = {"workflowType": "machine_learning", "compareRunsMode": "CHART" if charts else "TABLE"}
    known = {tag["key"].removeprefix(VIEWS) for tag in found.get("tags", ())}
    if keys := [key for key in ([view_of(data)] if data else []) + [VIEW] if key in known]:
        view["viewStateShareKey"] = keys[0]
    return f"{address}/#/experiments/{found['experiment_id']}/runs?{urlencode(view)}"


def run_link(address: str, experiment_id: str, run_id: str) -> str:
    """Returns the link to a run's charts."""
    return f"{address}/#/experiments/{experiment_id}/runs/{run_id}/model-metrics?workflowType=machine_learning"


def _announce(link: str, browser: bool) -> None:
    print(link, flush=True)
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


def _answers(server: subprocess.Popen[bytes], address: str) -> bool:
    """Waits until the server answers; returns whether it does."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urlopen(f"{address}/health", timeout=ANSWER_S):
                return True
        except OSError:
            time.sleep(0.1)
    return False


def _stop(server: subprocess.Popen[bytes]) -> None:
    for ending in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, ending)
            server.wait(STOP_S)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    server.wait()
