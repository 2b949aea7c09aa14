"""Opens a store, an experiment and a run in it. MLflow is imported where it is opened, never with the module."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmeta.errors import FedmetaError
from fedmeta.experiment import Tracking, with_user_info
from fedmeta.tracking import experiment_page, run_page
from fedmeta.tracking.entries import Dataset
from fedmeta.tracking.store import MLFLOW_DEFAULTS, artifact_folder, create_sqlite, shown

if TYPE_CHECKING:
    from mlflow import MlflowClient

PARAMS_PER_BATCH = 100
LONGEST_PARAM = 6000
FOLDER_TAG = "fedmeta.folder"
"""The tag that names the run's folder, which is known before MLflow's id of the run is."""


def open_client(uri: str) -> MlflowClient:
    """Returns a client of a store, set to fail at once and quietly: whoever uses it tries again."""
    for key, value in MLFLOW_DEFAULTS.items():
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient

    create_sqlite(uri, lambda new: MlflowClient(new).search_experiments(max_results=1))
    return MlflowClient(with_user_info(uri))


def open_run(
    uri: str,
    settings: Tracking,
    params: Mapping[str, Any],
    dataset: Dataset | None,
    folder: Path,
    resume_run_id: str | None,
) -> tuple[MlflowClient, str]:
    """Opens a run, new or resumed, and logs what is known of it.

    Args:
        uri: The store, as `checked_uri` returns it.
        settings: The experiment's section [tracking].
        params: The whole experiment as flat "section.key" values.
        dataset: The data to list as the run's input.
        folder: The run's folder.
        resume_run_id: The run to go on with; empty where it is to be looked for, None for a new one.

    Returns:
        The store's client and the run's id.
    """
    client = open_client(uri)
    if resume_run_id:
        client.update_run(resume_run_id, status="RUNNING")
        return client, resume_run_id
    experiment_id = experiment_of(client, uri, settings.experiment)
    run_id = _begun_for(client, experiment_id, folder) if resume_run_id is not None else None
    if run_id is None:
        tags = {**run_page.tags(params), FOLDER_TAG: folder.name}
        name = settings.name or run_page.run_name(params)
        run_id = str(client.create_run(experiment_id, tags=tags, run_name=name).info.run_id)
    log_params(client, run_id, params)
    if dataset is not None:
        _log_dataset(client, run_id, dataset)
    return client, run_id


def _begun_for(client: MlflowClient, experiment_id: str, folder: Path) -> str | None:
    """Returns the run that was created for a folder, where its process died before it could write down which."""
    runs = client.search_runs([experiment_id], filter_string=f"tags.{FOLDER_TAG} = '{folder.name}'")
    return str(runs[0].info.run_id) if runs else None


def experiment_of(client: MlflowClient, uri: str, name: str) -> str:
    """Returns the experiment's id; its artifacts lie beside a database, wherever the process runs."""
    from mlflow import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            created = client.create_experiment(name, artifact_folder(uri), tags=experiment_page.experiment_tags())
            return str(created)
        except MlflowException:
            # Another run may have created it meanwhile.
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise FedmetaError(f'tracking.experiment "{name}" was deleted in {shown(uri)}; restore it or name another')
    if experiment_page.VIEW_TAG not in experiment.tags:
        client.set_experiment_tag(experiment.experiment_id, experiment_page.VIEW_TAG, experiment_page.view())
    return str(experiment.experiment_id)


def log_params(client: MlflowClient, run_id: str, params: Mapping[str, Any]) -> None:
    """Logs params, cut to the length and sent in the batches that MLflow takes."""
    from mlflow.entities import Param

    entries = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in params.items()]
    for start in range(0, len(entries), PARAMS_PER_BATCH):
        client.log_batch(run_id, params=entries[start : start + PARAMS_PER_BATCH])


def _log_dataset(client: MlflowClient, run_id: str, dataset: Dataset) -> None:
    from mlflow import entities

    source, profile = json.dumps({"path": dataset.source}), json.dumps({"sites": dataset.sites})
    logged = entities.Dataset(dataset.name, dataset.digest, "local", source, profile=profile)
    client.log_inputs(
        run_id, datasets=[entities.DatasetInput(logged, [entities.InputTag("mlflow.data.context", "federation")])]
    )
