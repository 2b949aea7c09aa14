from pathlib import Path

import pytest

from fedmeta.errors import FedmetaError
from fedmeta.tracking.events import UNSENT, End, MetricValue, sync, write_unsent
from fedmeta.tracking.mlflow_client import open_client


@pytest.fixture
def store(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/mlflow.db"


def kept(folder: Path, store: str) -> str:
    """Leaves a run's folder with events that its store has not got; returns the run's id."""
    client = open_client(store)
    run_id = str(client.create_run("0").info.run_id)
    folder.mkdir(parents=True)
    (folder / "experiment.toml").write_text(f'[tracking]\nuri = "{store}"\n')
    events = [MetricValue("train/query_loss", 0.5 / step, 1000 + step, step) for step in (1, 2)]
    write_unsent(folder / UNSENT, run_id, [*events, End("FINISHED", 2000)])
    return run_id


@pytest.mark.slow
def test_what_waits_in_the_folder_of_all_runs_is_sent_once(tmp_path: Path, store: str) -> None:
    ids = [kept(tmp_path / "runs" / name, store) for name in ("one", "two")]
    held = (tmp_path / "runs" / "two" / UNSENT).read_bytes()
    assert list(sync(tmp_path / "runs")) == [(tmp_path / "runs" / name, 3, 0) for name in ("one", "two")]
    assert list(sync(tmp_path / "runs")) == []
    (tmp_path / "runs" / "two" / UNSENT).write_bytes(held)
    assert list(sync(tmp_path / "runs" / "two")) == [(tmp_path / "runs" / "two", 3, 0)]
    for run_id in ids:
        assert open_client(store).get_run(run_id).info.status == "FINISHED"
        history = open_client(store).get_metric_history(run_id, "train/query_loss")
        assert [(entry.step, entry.value) for entry in history] == [(1, 0.5), (2, 0.25)]


@pytest.mark.slow
def test_what_cannot_be_read_is_named(tmp_path: Path, store: str) -> None:
    with pytest.raises(FedmetaError, match="nowhere: no such folder"):
        list(sync(tmp_path / "nowhere"))
    folder = tmp_path / "runs" / "one"
    kept(folder, store)
    whole = (folder / UNSENT).read_text()
    for damaged in ("", whole[:-5], "[]\n", '{"run_id": "a"}\n{"kind": "Nonsense"}\n', "\udc80"):
        (folder / UNSENT).write_bytes(damaged.encode("utf-8", "surrogateescape"))
        with pytest.raises(FedmetaError, match=r"unsent\.jsonl: not the unsent events of a run"):
            list(sync(folder))
    (folder / UNSENT).write_text(whole)
    (folder / "experiment.toml").unlink()
    with pytest.raises(FedmetaError, match="name the store with --uri"):
        list(sync(folder))
    assert [sent.left for sent in sync(folder, store)] == [0]
