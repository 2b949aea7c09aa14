"""Stores: addresses that cannot be used, logins, and what runs left there."""

import base64
import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment, tracking_uri
from fedmeta.tracking import mlflow_client
from fedmeta.tracking.run_logger import Tracker
from fedmeta.tracking.ui import experiment_link


def start(uri, folder):
    described = Experiment.from_toml(f'[tracking]\nuri = "{uri}"\n', "a test")
    return Tracker.start(described.tracking, described.params(), folder)


@pytest.fixture
def wrong_uris(tmp_path):
    (tmp_path / "file").write_text("not a database, but long enough to look like one")
    (tmp_path / "folder").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "no server": f"http://127.0.0.1:{port}",
        "no database server": f"postgresql://user:secret@127.0.0.1:{port}/mlflow",
        "no host": "http://",
        "bad port": "http://localhost:port",
        "unknown scheme": "ftp://somewhere/mlflow.db",
        "only a file": "mlflow.db",
        "no database": f"sqlite:///{tmp_path}/file",
        "a folder": f"sqlite:///{tmp_path}/folder",
        "a file for a folder": f"sqlite:///{tmp_path}/file/mlflow.db",
        "in memory": "sqlite:///:memory:",
    }


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("no server", "nothing answers at 127.0.0.1:"),
        ("no database server", "nothing answers at 127.0.0.1:"),
        ("no host", "it names no host"),
        ("bad port", "Port could not be cast"),
        ("unknown scheme", "it must begin with sqlite:///"),
        ("only a file", "a SQLite file is written sqlite:///mlflow.db"),
        ("no database", "is no SQLite database"),
        ("a folder", "it names no file"),
        ("a file for a folder", "/file"),
        ("in memory", "it names no file"),
    ],
)
def test_a_store_that_cannot_be_used_is_reported_at_the_start(wrong_uris, tmp_path, kind, reason, capfd, monkeypatch):
    for name in (tracking_uri.USER, tracking_uri.PASSWORD):
        monkeypatch.setenv(name, "")
    uri = wrong_uris[kind]
    with pytest.raises(FedmetaError) as refused:
        start(uri, tmp_path / "run")
    message = str(refused.value)
    assert reason in message
    assert uri.replace("user:secret@", "") in message
    assert "secret" not in message
    assert "\n" not in message
    lines = capfd.readouterr().err.splitlines()
    assert all(line.startswith("fedmeta: note: tracking.uri") for line in lines), "MLflow keeps quiet"


@pytest.fixture
def behind_a_login():
    """A server that knows one user, and answers no other; yields its port and the logins that it was given."""
    logins = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            logins.append(self.headers.get("Authorization"))
            known = logins[-1] == "Basic " + base64.b64encode(b"ada:se cret").decode()
            self.send_response(200 if known else 401)
            self.end_headers()
            self.wfile.write(b'{"experiment": {"experiment_id": "7"}}' if known else b"You are not authenticated.")

        do_POST = do_GET  # noqa: N815

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port, logins
    server.shutdown()
    server.server_close()


def test_a_missing_login_is_named(behind_a_login, tmp_path, monkeypatch):
    port, _ = behind_a_login
    for name in (tracking_uri.USER, tracking_uri.PASSWORD):
        monkeypatch.delenv(name, raising=False)
    asks = "asks for a login; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    with pytest.raises(FedmetaError, match=asks):
        start(f"http://127.0.0.1:{port}", tmp_path)
    with pytest.raises(FedmetaError, match=asks):
        mlflow_client.status_of(f"http://127.0.0.1:{port}", "0")


def test_a_login_in_the_address_moves_to_the_environment(behind_a_login, monkeypatch):
    port, logins = behind_a_login
    monkeypatch.setenv(tracking_uri.USER, "")
    monkeypatch.setenv(tracking_uri.PASSWORD, "")
    uri = mlflow_client.checked_uri(f"http://ada:se%20cret@127.0.0.1:{port}")
    assert uri == f"http://127.0.0.1:{port}"
    assert (os.environ[tracking_uri.USER], os.environ[tracking_uri.PASSWORD]) == ("ada", "se cret")
    assert mlflow_client.open_client(uri).get_experiment_by_name("any").experiment_id == "7"
    assert "/#/experiments/7/runs?" in experiment_link(uri, "any")
    assert None not in logins


@pytest.mark.slow
def test_files_that_a_run_does_not_have_are_named(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow_client.open_client(uri)
    run_id = client.create_run(client.create_experiment("any", (tmp_path / "artifacts").as_uri())).info.run_id
    client.log_text(run_id, "{}", "comparison.json")
    assert mlflow_client.fetch_files(uri, run_id, ["comparison.json"], tmp_path / "some")
    assert (tmp_path / "some" / "comparison.json").read_text() == "{}"
    assert not mlflow_client.fetch_files(uri, run_id, ["comparison.json", "sites.parquet"], tmp_path / "none")
    with pytest.raises(FedmetaError, match="has no checkpoint: it has not ended"):
        mlflow_client.fetch_checkpoint(uri, run_id, tmp_path / "none")
    with pytest.raises(FedmetaError, match=f"cannot fetch run {run_id}"):
        mlflow_client.fetch_run(uri, run_id, tmp_path / "none")
    client.set_terminated(run_id)
    (tmp_path / "artifacts").rename(tmp_path / "elsewhere")
    moved = "it has ended, and its files are not at .*artifacts: was a folder moved or renamed"
    with pytest.raises(FedmetaError, match=f"has no checkpoint: {moved}"):
        mlflow_client.fetch_checkpoint(uri, run_id, tmp_path / "none")
    with pytest.raises(FedmetaError, match=moved):
        mlflow_client.fetch_run(uri, run_id, tmp_path / "none")
    with pytest.raises(FedmetaError, match="does not have run 0123"):
        mlflow_client.status_of(uri, "0123")
    with pytest.raises(FedmetaError, match="must be written models:/NAME/VERSION"):
        mlflow_client.fetch_registered(uri, "models:/heart", tmp_path, "file")
    with pytest.raises(FedmetaError, match="does not have models:/heart/1"):
        mlflow_client.fetch_registered(uri, "models:/heart/1", tmp_path, "file")
