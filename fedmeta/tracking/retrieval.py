"""Reads a run back out of MLflow: how a submitter learns what came of a run that happened elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedmeta.errors import FedmetaError
from fedmeta.tracking.opening import open_client
from fedmeta.tracking.store import checked_uri, first_line, shown, within_time

FINISHED = "FINISHED"
SUMMARY = "summary.json"

_WANTED = (SUMMARY, "sites.parquet", "experiment.toml")


def status_of(uri: str, run_id: str) -> str:
    """Returns what MLflow says of a run: RUNNING, FINISHED, FAILED or KILLED.

    Raises:
        FedmetaError: The store cannot be reached, or has no such run.
    """
    uri = checked_uri(uri)
    try:
        return str(within_time(uri, lambda: open_client(uri).get_run(run_id).info.status))
    except FedmetaError:
        raise
    except Exception as error:
        raise FedmetaError(f"{shown(uri)} has no run {run_id}: {first_line(error)}") from error


def fetch(uri: str, run_id: str, folder: Path) -> dict[str, Any]:
    """Downloads a finished run's summary, sites, experiment and checkpoint into a folder; returns the summary.

    Raises:
        FedmetaError: An artifact is missing or the folder cannot be written.
    """
    uri = checked_uri(uri)
    client = open_client(uri)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = [file.path for file in client.list_artifacts(run_id)]
        checkpoints = [path for path in there if path.endswith(".safetensors")]
        for path in (*_WANTED, *checkpoints[-1:]):
            client.download_artifacts(run_id, path, str(folder))
        summary: dict[str, Any] = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except OSError as error:
        raise FedmetaError(f"cannot fetch run {run_id} into {folder}: {error.strerror or error}") from error
    except Exception as error:
        raise FedmetaError(f"cannot fetch run {run_id} from {shown(uri)}: {first_line(error)}") from error
    if checkpoints:
        summary["checkpoint"] = str(folder / checkpoints[-1])
    return summary


def fetch_files(uri: str, run_id: str, names: Sequence[str], folder: Path) -> bool:
    """Downloads some of a run's files into a folder, if it has them all; returns whether it has.

    Raises:
        FedmetaError: The store cannot be reached, has no such run, or the folder cannot be written.
    """
    uri = checked_uri(uri)
    status_of(uri, run_id)
    client = open_client(uri)
    try:
        there = {file.path for file in client.list_artifacts(run_id)}
        if not there.issuperset(names):
            return False
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            client.download_artifacts(run_id, name, str(folder))
    except OSError as error:
        raise FedmetaError(f"cannot fetch run {run_id} into {folder}: {error.strerror or error}") from error
    except Exception as error:
        raise FedmetaError(f"cannot fetch run {run_id} from {shown(uri)}: {first_line(error)}") from error
    return True
