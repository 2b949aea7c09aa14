"""Where a run is submitted, and the message where that is not possible."""

import socket
import tomllib
from pathlib import Path

import pytest

import fedmeta
from fedmeta import launch
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.progress import Progress
from fedmeta.runtime import deployment


@pytest.fixture
def certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "ca.crt"
    path.write_text("")
    monkeypatch.setenv(deployment.ROOT_CERTIFICATES, str(path))
    monkeypatch.delenv(deployment.SUPERLINK, raising=False)
    return path


@pytest.mark.parametrize("address", ["fl.example.org:8000", "10.0.0.1:443", "[::1]:8000"])
def test_the_connection_is_encrypted(certificate: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv(deployment.SUPERLINK, address)
    connection = tomllib.loads(deployment.connection())["superlink"]["fedmeta"]
    assert connection == {"address": address, "root-certificates": str(certificate)}


def test_plain_text_is_asked_for_by_name_and_reported(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(deployment.ROOT_CERTIFICATES, "none")
    assert tomllib.loads(deployment.connection())["superlink"]["fedmeta"]["insecure"] is True
    assert "WARNING: plain text to 127.0.0.1:8000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        (deployment.ROOT_CERTIFICATES, "", "FEDMETA_ROOT_CERTIFICATES is not set"),
        (deployment.ROOT_CERTIFICATES, "/nowhere/ca.crt", "/nowhere/ca.crt: no such file"),
        (deployment.SUPERLINK, "https://fl.example.org:8000", "give HOST:PORT, without a scheme"),
        (deployment.SUPERLINK, "fl.example.org", "give HOST:PORT"),
        (deployment.SUPERLINK, 'x"\n:80', "give HOST:PORT"),
    ],
)
def test_what_is_missing_is_named(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(FedmetaError, match=words):
        deployment.connection()


def test_an_untracked_run_cannot_be_deployed(certificate: Path) -> None:
    with pytest.raises(FedmetaError, match="comes back through MLflow"):
        fedmeta.run(Experiment().with_overrides(["tracking.uri=none"]), runtime="deployment")


def test_the_environments_store_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launch.TRACKING_URI, "http://mlflow:5000")
    assert launch.tracked(Experiment()).tracking.uri == "http://mlflow:5000"
    monkeypatch.delenv(launch.TRACKING_URI)
    assert launch.tracked(Experiment()) == Experiment()


def test_progress_survives_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(3, 10, 0.5, 0.75, 1, 'refused "a"\nb', "run")
    log, reader = launch.LogWriter(), launch.LogReader()
    log.progress(progress)
    log.error("no\nsite: fedmeta log: 0123456789abcdef")
    forged = f"fedmeta 0123456789abcdef progress: {progress.to_json()}"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    found = [
        reader.read(line) for line in ("Flower's own", *lines[:2], f"{launch.LOG}0123456789abcdef", forged, lines[2])
    ]
    assert found == [None, None, progress, None, None, r"no\nsite: fedmeta log: 0123456789abcdef"]


@pytest.mark.slow
def test_a_superlink_that_does_not_answer_is_named(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: who connects is refused
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv(deployment.SUPERLINK, address)
        monkeypatch.setenv(deployment.ROOT_CERTIFICATES, deployment.PLAIN_TEXT)
        with pytest.raises(FedmetaError, match=f"the SuperLink at {address} did not take the run"):
            fedmeta.run(Experiment(), runtime="deployment")
