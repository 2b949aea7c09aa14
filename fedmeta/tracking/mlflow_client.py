"""MLflow stores: addresses checked before anything waits for them, stores opened, and files of runs fetched.

MLflow is imported where a store is opened, never with this module.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

import pandas as pd

from fedmeta.errors import FedmetaError
from fedmeta.experiment.tracking_uri import PASSWORD, USER, keep_user_info, with_user_info, without_user_info
from fedmeta.problems.metric import Metric
from fedmeta.tracking import experiment_view
from fedmeta.tracking.store_version import refuse_other_version

if TYPE_CHECKING:
    from mlflow import MlflowClient, MlflowException

Value = TypeVar("Value")

SQLITE = "sqlite:///"
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
PORTS = {"http": 80, "https": 443, **DATABASE_PORTS}
# How MLflow behaves unless users set it otherwise: failed requests are repeated by fedmeta, and nothing phones home.
MLFLOW_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    # It logs each error that it raises, with the whole traceback.
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_DISABLE_AGENT_HINT": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}
CONNECTION_S = 5.0
OPENING_HTTP_S = 15.0
OPENING_DATABASE_S = 60.0
OPENING_FILE_S = 600.0
"""A file is never out of reach, but a busy machine takes minutes to build a new one's tables."""
PARAMS_PER_BATCH = 100
LONGEST_PARAM = 6000
FINISHED = "FINISHED"
SUMMARY, SITES = "summary.json", "sites.parquet"
CHECKPOINT = ".safetensors"


# Addresses


def sqlite_file(uri: str) -> Path | None:
    """Returns the absolute path of a SQLite store's file, or None for a store of another kind."""
    return Path(uri.removeprefix(SQLITE).partition("?")[0]).absolute() if uri.startswith(SQLITE) else None


def checked_uri(uri: str) -> str:
    """Checks what can be checked of a store at once, and creates the folder of a SQLite file.

    Returns:
        The address, absolute, and without user and password: these move into MLflow's environment variables, so that
        neither messages nor what is stored can hold them.

    Raises:
        FedmetaError: The address is malformed, its folder cannot be written, its file is no SQLite database, its server
            cannot be reached, or its tables are of another version of MLflow.
    """
    file = sqlite_file(uri)
    if file is not None:
        _check_sqlite(uri, file)
        refuse_other_version(f"{SQLITE}{file}", f"{SQLITE}{file}", file)
        return f"{SQLITE}{file}"
    uri = keep_user_info(uri)
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise _unusable(uri, str(error)) from error
    dialect = parts.scheme.partition("+")[0]
    if dialect not in PORTS:
        hint = f" (a SQLite file is written {SQLITE}{uri})" if not parts.scheme else ""
        raise _unusable(uri, f"it must begin with {SQLITE}, http://, https:// or postgresql://{hint}")
    if not host:
        raise _unusable(uri, "it names no host")
    if dialect in DATABASE_PORTS or not getproxies():
        try:
            socket.create_connection((host, port or PORTS[dialect]), timeout=CONNECTION_S).close()
        except OSError as error:
            place = f"{host}:{port or PORTS[dialect]}"
            raise _unusable(uri, f"nothing answers at {place} ({error.strerror or error})") from error
    if dialect in DATABASE_PORTS:
        refuse_other_version(uri, with_user_info(uri))
    return uri


def _check_sqlite(uri: str, file: Path) -> None:
    if file.name == ":memory:" or file.is_dir():
        raise _unusable(uri, f"it names no file (try {SQLITE}mlflow.db)")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        head = b""
        if file.exists():
            with file.open("rb") as stream:
                head = stream.read(16)
    except OSError as error:
        raise _unusable(uri, f"{error.filename or file}: {error.strerror}") from error
    if head and head != b"SQLite format 3\0":
        raise _unusable(uri, f"{file} is no SQLite database")
    # SQLite keeps its journal beside the file, so the folder must be writable as well.
    for place in (file.parent, file):
        if place.exists() and not os.access(place, os.W_OK):
            raise _unusable(uri, f"{place} cannot be written")


def _unusable(uri: str, reason: str) -> FedmetaError:
    return FedmetaError(f'tracking.uri "{without_user_info(uri)}" cannot be used: {reason}')


# Errors


def with_timeout(uri: str, call: Callable[[], Value]) -> Value:
    """Calls in a thread and stops waiting after a while: MLflow repeats some requests for a minute and more.

    Raises:
        FedmetaError: The call failed or took too long.
    """
    seconds = OPENING_HTTP_S if uri.startswith("http") else OPENING_DATABASE_S
    seconds = OPENING_FILE_S if uri.startswith(SQLITE) else seconds
    values: list[Value] = []
    errors: list[Exception] = []

    def attempt() -> None:
        try:
            values.append(call())
        except Exception as error:
            errors.append(error)

    thread = Thread(target=attempt, name="fedmeta-store", daemon=True)
    thread.start()
    thread.join(seconds)
    if values:
        return values[0]
    if errors and isinstance(errors[0], FedmetaError):
        raise errors[0]
    raise _unusable(uri, reason_of(errors[0]) if errors else f"no answer within {seconds:.0f} s")


def status_of_error(error: MlflowException) -> int:
    """Returns the HTTP status that an error of MLflow stands for."""
    code: int = error.get_http_status_code()  # type: ignore[no-untyped-call]
    return code


def reason_of(error: Exception) -> str:
    """Returns an error's reason in one short line: the network's or SQLite's where these are at its bottom."""
    status = getattr(error, "get_http_status_code", None)  # of MLflow's own errors
    if status and status() == 401:
        return f"it asks for a login; set {USER} and {PASSWORD}"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConnectionError | TimeoutError | socket.gaierror) and cause.strerror:
            return cause.strerror
        if isinstance(cause, sqlite3.Error):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def log_notice(message: str) -> None:
    """Prints what the user should know about tracking; training continues."""
    print(f"fedmeta: tracking: {message}", file=sys.stderr)


# Stores, experiments and what they show


class Dataset(NamedTuple):
    """The data of a run as MLflow lists it; `digest` has at most 36 characters."""

    name: str
    source: str
    digest: str
    sites: int


def open_client(uri: str) -> MlflowClient:
    """Returns a client of a store, set to fail at once and quietly: its callers repeat what failed."""
    for key, value in MLFLOW_DEFAULTS.items():
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient

    file = sqlite_file(uri)
    if file is not None and file.parent.is_dir() and not file.exists():
        _create_sqlite(uri, file, lambda new: MlflowClient(new).search_experiments(max_results=1))
    return MlflowClient(with_user_info(uri))


def _create_sqlite(uri: str, file: Path, build_tables: Callable[[str], object]) -> None:
    """Creates a SQLite store's file, whole or not at all.

    MLflow builds its tables in dozens of steps, and a process that dies between two leaves a file that no later one can
    use. So they are built elsewhere, and the file appears at once. Of two processes that do so, the first one's stays.
    """
    with tempfile.TemporaryDirectory(prefix="fedmeta-") as folder:
        built = Path(folder, "mlflow.db")
        build_tables(f"{SQLITE}{built}")
        content = built.read_bytes()
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        part.write_bytes(content)
        with suppress(FileExistsError):
            os.link(part, file)
    except OSError as error:
        raise _unusable(uri, f"{file}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def experiment_of(client: MlflowClient, uri: str, name: str, score: Metric | None = None, data: str = "") -> str:
    """Returns an experiment's id; creates it, and its views by the score, of all runs and of the data, if not there.

    Artifacts of a database's experiments lie beside a SQLite file, wherever the process runs.

    Raises:
        FedmetaError: The experiment was deleted.
    """
    from mlflow import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        file = sqlite_file(uri)
        folder = ((file.parent if file else Path.cwd()) / "mlartifacts").as_uri()
        try:
            client.create_experiment(
                name, None if uri.startswith(("http://", "https://")) else folder, tags=experiment_view.KIND
            )
        except MlflowException:
            # Another run may have created it meanwhile.
            if client.get_experiment_by_name(name) is None:
                raise
        experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    if experiment.lifecycle_stage != "active":
        raise FedmetaError(f'tracking.experiment "{name}" was deleted in {uri}; restore it or name another')
    views = experiment_view.tags(score) | (experiment_view.data_tags(score, data) if data else {}) if score else {}
    for key, value in views.items():
        if key not in experiment.tags:
            client.set_experiment_tag(experiment.experiment_id, key, value)
    return str(experiment.experiment_id)


def log_params(client: MlflowClient, run_id: str, params: Mapping[str, Any]) -> None:
    """Logs params, cut to the length and sent in the batches that MLflow takes."""
    from mlflow.entities import Param

    entries = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in params.items()]
    for start in range(0, len(entries), PARAMS_PER_BATCH):
        client.log_batch(run_id, params=entries[start : start + PARAMS_PER_BATCH])


def log_dataset(client: MlflowClient, run_id: str, dataset: Dataset) -> None:
    """Logs what MLflow lists as the data of a run."""
    from mlflow import entities

    source, profile = json.dumps({"path": dataset.source}), json.dumps({"sites": dataset.sites})
    logged = entities.Dataset(dataset.name, dataset.digest, "local", source, profile=profile)
    tag = entities.InputTag("mlflow.data.context", "federation")
    client.log_inputs(run_id, datasets=[entities.DatasetInput(logged, [tag])])


def log_table(client: MlflowClient, run_id: str, frame: pd.DataFrame, name: str) -> None:
    """Logs a table, or replaces the one of that name; MLflow's own `log_table` would append to that."""
    if any(file.path == name for file in client.list_artifacts(run_id)):
        client.log_text(run_id, frame.to_json(orient="split", index=False), name)
    else:
        client.log_table(run_id, frame, name)


def log_picture(client: MlflowClient, run_id: str, path: Path, key: str, step: int) -> None:
    """Logs a picture among the run's charts at a step, once."""
    from PIL import Image

    if step not in picture_steps(client, run_id, key):
        with Image.open(path) as image:
            client.log_image(run_id, image, key=key, step=step)


def picture_steps(client: MlflowClient, run_id: str, key: str) -> set[int]:
    """Returns the steps at which a run has a picture."""
    head = f"images/{key.replace('/', '~')}+step+"
    files = [file.path for file in client.list_artifacts(run_id, "images") if file.path.startswith(head)]
    return {int(path.removeprefix(head).partition("+")[0]) for path in files}


# What runs left


def status_of(uri: str, run_id: str) -> str:
    """Returns a run's status: RUNNING, FINISHED, FAILED or KILLED.

    Raises:
        FedmetaError: The store cannot be reached, or has no such run.
    """
    uri = checked_uri(uri)
    return str(_ask(uri, f"run {run_id}", lambda: open_client(uri).get_run(run_id).info.status))


def fetch_run(uri: str, run_id: str, folder: Path) -> dict[str, Any]:
    """Downloads a finished run's summary, sites, experiment, checkpoint and pictures; returns the summary.

    Raises:
        FedmetaError: A file is missing, or the folder cannot be written.
    """

    def wanted(names: list[str]) -> list[str]:
        return [SUMMARY, SITES, "experiment.toml", *_checkpoints(names)[-1:], *({"pictures"} & set(names))]

    files = _download(uri, run_id, lambda names: wanted(names) if SUMMARY in names else (), folder)
    if not files:
        why = _why_without(uri, run_id)
        raise FedmetaError(f"cannot fetch run {run_id} from {without_user_info(uri)}: it has no {SUMMARY}: {why}")
    try:
        summary: dict[str, Any] = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FedmetaError(f"run {run_id} in {without_user_info(uri)} has a damaged {SUMMARY}: {error}") from error
    checkpoints = [file for file in files if file.name.endswith(CHECKPOINT)]
    return summary | ({"checkpoint": str(checkpoints[-1])} if checkpoints else {})


def fetch_files(uri: str, run_id: str, names: Sequence[str], folder: Path) -> bool:
    """Downloads some of a run's files if it has them all; returns whether it has.

    Raises:
        FedmetaError: The store cannot be reached, has no such run, or the folder cannot be written.
    """
    return bool(_download(uri, run_id, lambda there: names if set(names) <= set(there) else (), folder))


def fetch_checkpoint(uri: str, run_id: str, folder: Path) -> Path:
    """Downloads a run's newest checkpoint into a folder and returns its file.

    Raises:
        FedmetaError: The store cannot be reached, or has no such run or no checkpoint of it.
    """
    files = _download(uri, run_id, lambda names: _checkpoints(names)[-1:], folder)
    if not files:
        raise FedmetaError(f"run {run_id} in {without_user_info(uri)} has no checkpoint: {_why_without(uri, run_id)}")
    return files[0]


def _why_without(uri: str, run_id: str) -> str:
    """Returns why a run of a store has none of its files: it has not ended, or they were moved."""
    info = _ask(uri, f"run {run_id}", lambda: open_client(checked_uri(uri)).get_run(run_id).info)
    if info.status != "FINISHED":
        return f"it has not ended (its status is {info.status})"
    return (
        f"it has ended, and its files are not at {without_user_info(str(info.artifact_uri))}: was a folder moved or "
        "renamed? Name the run's own folder instead"
    )


def fetch_registered(uri: str, model: str, folder: Path, name: str) -> Path:
    """Downloads a registered model, `models:/NAME/VERSION` or `models:/NAME@ALIAS`; returns its file of this name.

    Raises:
        FedmetaError: The store cannot be reached, or has no such model, or it has no such file.
    """
    uri = checked_uri(uri)
    client = open_client(uri)
    wanted, _, alias = model.removeprefix("models:/").partition("@")
    registered, _, version = wanted.rpartition("/")
    if not (alias or (registered and version.isdigit())):
        raise FedmetaError(
            f"{model}: must be written models:/NAME/VERSION, such as models:/digits/1, or models:/NAME@ALIAS"
        )
    found = _ask(
        uri,
        model,
        lambda: (
            client.get_model_version_by_alias(wanted, alias) if alias else client.get_model_version(registered, version)
        ),
    )
    from mlflow.artifacts import download_artifacts

    try:
        download_artifacts(found.source, dst_path=str(folder), tracking_uri=with_user_info(uri))
    except Exception as error:
        raise FedmetaError(f"cannot fetch {model} from {uri}: {reason_of(error)}") from error
    file = next(folder.rglob(name), None)
    if file is None:
        raise FedmetaError(f"{model} in {uri} is no model of fedmeta: it holds no {name}")
    return file


def _checkpoints(names: Sequence[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(CHECKPOINT))


def _download(uri: str, run_id: str, choose: Callable[[list[str]], Sequence[str]], folder: Path) -> list[Path]:
    """Downloads those of a run's files that are chosen from their names."""
    uri = checked_uri(uri)
    client = open_client(uri)

    def names() -> list[str]:
        client.get_run(run_id)
        return [file.path for file in client.list_artifacts(run_id)]

    chosen = choose(_ask(uri, f"run {run_id}", names))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [Path(client.download_artifacts(run_id, name, str(folder))) for name in chosen]
    except OSError as error:
        raise FedmetaError(f"cannot fetch run {run_id} into {folder}: {error.strerror or error}") from error
    except Exception as error:
        raise FedmetaError(f"cannot fetch run {run_id} from {uri}: {reason_of(error)}") from error


def _ask(uri: str, what: str, call: Callable[[], Value]) -> Value:
    """Returns what a store answers.

    Raises:
        FedmetaError: It does not answer, or does not have what was asked for.
    """

    def attempt() -> Value:
        try:
            return call()
        except Exception as error:
            from mlflow import MlflowException

            if not isinstance(error, MlflowException) or status_of_error(error) in (401, 403):
                raise
            if status_of_error(error) >= 500:
                raise
            raise FedmetaError(f"{uri} does not have {what}: {reason_of(error)}") from error

    return with_timeout(uri, attempt)
