"""A store that another MLflow made is left alone: it is refused before anything is written to it."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from fedmeta.errors import FedmetaError
from fedmeta.tracking import mlflow_client
from fedmeta.tracking.store_version import UPGRADE, refuse_other_version, revisions

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def current(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A store of the installed MLflow."""
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow_client.open_client(f"sqlite:///{file}")
    return file.read_bytes()


def store(folder: Path, current: bytes, revision: str) -> Path:
    file = folder / "mlflow.db"
    file.write_bytes(current)
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("UPDATE alembic_version SET version_num = ?", (revision,)).rowcount == 1
        connection.commit()
    return file


@pytest.mark.slow
def test_the_installed_mlflows_own_store_is_used(tmp_path: Path, current: bytes) -> None:
    file = store(tmp_path, current, revisions()[0])
    assert mlflow_client.checked_uri(f"sqlite:///{file}") == f"sqlite:///{file}"
    assert file.read_bytes()


@pytest.mark.parametrize("age", [1, 5, -1])
def test_an_older_mlflows_store_is_refused_with_what_to_do_and_not_touched(
    age: int, tmp_path: Path, current: bytes
) -> None:
    revision = revisions()[age]
    file = store(tmp_path, current, revision)
    before = file.read_bytes()
    with pytest.raises(FedmetaError, match=rf"revision {revision}.*mlflow db upgrade sqlite:///.*{UPGRADE}=1") as error:
        mlflow_client.checked_uri(f"sqlite:///{file}")
    assert len(str(error.value).splitlines()) == 1
    assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db"]


@pytest.mark.slow
def test_a_store_that_mlflow_2_9_made_is_refused_and_upgraded_only_when_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript(Path(__file__).with_name("mlflow_2_9_2.sql").read_text())
    before = file.read_bytes()
    with pytest.raises(FedmetaError, match=r"revision acf3f17fdcc7.*mlflow db upgrade"):
        mlflow_client.checked_uri(f"sqlite:///{file}")
    assert file.read_bytes() == before
    monkeypatch.setenv(UPGRADE, "1")
    client = mlflow_client.open_client(mlflow_client.checked_uri(f"sqlite:///{file}"))
    (run,) = client.search_runs([client.get_experiment_by_name("theirs").experiment_id])
    assert run.data.metrics == {"a": 1.0}


def test_a_newer_mlflows_store_is_refused(tmp_path: Path, current: bytes) -> None:
    file = store(tmp_path, current, "f00dfeedf00d")
    with pytest.raises(FedmetaError, match="a newer MLflow made this store"):
        mlflow_client.checked_uri(f"sqlite:///{file}")


def test_a_person_may_allow_it(tmp_path: Path, current: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    file = store(tmp_path, current, revisions()[1])
    monkeypatch.setenv(UPGRADE, "1")
    assert mlflow_client.checked_uri(f"sqlite:///{file}") == f"sqlite:///{file}"


def test_databases_of_other_kinds_are_asked_too(tmp_path: Path, current: bytes) -> None:
    file = store(tmp_path, current, revisions()[2])
    with pytest.raises(FedmetaError, match=r'tracking.uri "shown" cannot be used: an older MLflow'):
        refuse_other_version("shown", f"sqlite:///{file}")
    refuse_other_version("shown", "postgresql://nobody@127.0.0.1:1/none")  # what cannot be asked MLflow reports


@pytest.mark.parametrize("content", [b"", b"SQLite format 3\0" + bytes(4000)])
def test_a_file_without_a_version_is_left_to_mlflow(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "new.db").write_bytes(content)
    refuse_other_version("shown", "", tmp_path / "new.db")
    refuse_other_version("shown", "", tmp_path / "nothing.db")
