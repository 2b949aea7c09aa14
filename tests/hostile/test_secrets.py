"""A password in the address of a store stays in the environment: no file, message or table of a run holds it."""

import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

import fedmeta
from fedmeta.experiment import Experiment, load_experiment
from fedmeta.runtime.local import LocalGrid
from fedmeta.runtime.superlink import write_run_config
from fedmeta.tracking import parent_run, run_logger

PASSWORD = "pl4nted-s3cret"
TOML = """
[tracking]
uri = "http://ann:{password}@127.0.0.1:{port}"
folder = "runs"
[server]
rounds = 1
[model]
hidden = "8"
"""


@pytest.fixture
def port() -> Iterator[int]:
    """A port at which something listens, as a tracking server would."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.slow
def test_a_run_writes_and_sends_no_password(
    port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")
    elsewhere, work = tmp_path / "elsewhere", tmp_path / "work"
    elsewhere.mkdir()
    work.mkdir()
    (elsewhere / "e.toml").write_text(TOML.format(password=PASSWORD, port=port))
    monkeypatch.chdir(work)
    opened: list[str] = []

    def open_client(uri: str) -> MlflowClient:
        opened.append(uri)
        return MlflowClient(f"sqlite:///{work / 'mlflow.db'}")

    monkeypatch.setattr(run_logger, "open_client", open_client)
    sent: list[str] = []
    usual = LocalGrid.pull_messages

    def pull_messages(self: LocalGrid, names: Iterable[str]) -> Iterable[Message]:
        sent.append(repr(self.context))
        sent.extend(repr(message.content) for message in self._pending.values())
        replies = list(usual(self, names))
        sent.extend(repr(message.content) for message in replies)
        return replies

    monkeypatch.setattr(LocalGrid, "pull_messages", pull_messages)
    result = fedmeta.run(load_experiment(elsewhere / "e.toml"))
    assert opened == [f"http://127.0.0.1:{port}"]
    files = [path for path in work.rglob("*") if path.is_file()]
    assert {"experiment.toml", "mlflow.db", "summary.json", "meta_model.safetensors"} <= {path.name for path in files}
    assert [path for path in files if PASSWORD.encode() in path.read_bytes()] == []
    assert len(sent) > 4
    assert not any(PASSWORD in each for each in sent)
    assert not any("[tracking]" in each for each in sent), "sites need not know where a run is tracked"
    printed = capfd.readouterr()
    assert PASSWORD not in printed.out + printed.err
    assert PASSWORD not in repr(result.summary)


@pytest.mark.parametrize("uri", ["http://ann:{}@127.0.0.1:5000", "postgresql://db/runs?password={}"])
def test_flower_carries_no_password(uri: str, tmp_path: Path) -> None:
    experiment = Experiment.from_toml(f'[tracking]\nuri = "{uri.format(PASSWORD)}"')
    config = write_run_config(tmp_path / "run.toml", experiment.to_toml())
    assert PASSWORD not in config.read_text()


@pytest.mark.slow
def test_a_comparison_writes_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    from mlflow import MlflowClient

    def open_client(uri: str) -> Any:
        return MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parent_run, "open_client", open_client)
    experiment = Experiment.from_toml(TOML.format(password=PASSWORD, port=port))
    with parent_run.parent_run(experiment, "comparison", "a name", tmp_path / "compare"):
        pass
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"mlflow.json", "mlflow.db"} <= {path.name for path in files}
    assert [path for path in files if PASSWORD.encode() in path.read_bytes()] == []
