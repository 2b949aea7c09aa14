"""What a site that joins takes out of MLflow: a run's checkpoint, or a registered model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedmeta.errors import FedmetaError
from fedmeta.experiment import with_user_info
from fedmeta.tracking.model import status_of_error
from fedmeta.tracking.opening import open_client
from fedmeta.tracking.store import checked_uri, first_line, shown, within_time


def fetch_checkpoint(uri: str, run_id: str, folder: Path) -> Path:
    """Downloads a run's newest checkpoint into a folder and returns its file.

    Raises:
        FedmetaError: The store cannot be reached, or has no such run or no checkpoint of it.
    """
    uri = checked_uri(uri)
    client = open_client(uri)
    files = _answer(uri, f"run {run_id}", lambda: client.list_artifacts(run_id))
    there = sorted(file.path for file in files if file.path.endswith(".safetensors"))
    if not there:
        raise FedmetaError(f"run {run_id} in {shown(uri)} has no checkpoint: it has not ended")
    return Path(_answer(uri, there[-1], lambda: client.download_artifacts(run_id, there[-1], str(folder))))


def fetch_registered(uri: str, model: str, folder: Path, name: str) -> Path:
    """Downloads a registered model, `models:/NAME/VERSION` or `models:/NAME@ALIAS`; returns its file of this name.

    Raises:
        FedmetaError: The store cannot be reached, or has no such model, or it has no such file.
    """
    uri = checked_uri(uri)
    client = open_client(uri)
    wanted, alias = model.removeprefix("models:/").partition("@")[::2]
    registered, _, version = wanted.rpartition("/")
    if not (alias or (registered and version.isdigit())):
        raise FedmetaError(
            f"{model}: must be written models:/NAME/VERSION, such as models:/digits/1, or models:/NAME@ALIAS"
        )
    found = _answer(
        uri,
        model,
        lambda: (
            client.get_model_version_by_alias(wanted, alias) if alias else client.get_model_version(registered, version)
        ),
    )
    from mlflow.artifacts import download_artifacts

    _answer(
        uri, model, lambda: download_artifacts(found.source, dst_path=str(folder), tracking_uri=with_user_info(uri))
    )
    file = next(folder.rglob(name), None)
    if file is None:
        raise FedmetaError(f"{model} in {shown(uri)} is no model of fedmeta: it holds no {name}")
    return file


def _answer(uri: str, what: str, call: Callable[[], Any]) -> Any:
    """Returns what a store answers.

    Raises:
        FedmetaError: It does not answer, or does not have what it was asked for.
    """
    answer = within_time(uri, lambda: _refusal_or(call))
    if isinstance(answer, Exception):
        raise FedmetaError(f"{shown(uri)} does not have {what}: {first_line(answer)}")
    return answer


def _refusal_or(call: Callable[[], Any]) -> Any:
    """Returns what a call gives, or MLflow's error where trying again would not help."""
    from mlflow import MlflowException

    try:
        return call()
    except MlflowException as error:
        if status_of_error(error) >= 500:
            raise
        return error
