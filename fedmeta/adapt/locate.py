"""Where a finished run is: a file, a folder, the folder of all runs, an MLflow store, or its model registry."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory

from fedmeta import checkpoint
from fedmeta.adapt.initialization import FILE, MetaModel
from fedmeta.errors import FedmetaError
from fedmeta.signing import refuse_checkpoint
from fedmeta.tracking import mlflow_client
from fedmeta.tracking.mlflow_client import sqlite_file

REGISTERED = "models:/"


def find_start(run: str, root: Path, uri: str, code: Collection[str] = ()) -> MetaModel:
    """Returns what a finished run hands to new sites.

    Args:
        run: A checkpoint or `meta_model.safetensors`; a run's folder, or an MLflow model's; a run's folder's name; its
            MLflow id; or `models:/NAME/VERSION` or `models:/NAME@ALIAS`.
        root: The folder of all runs.
        uri: The MLflow store that is asked where the run is not found here.
        code: What the run may name of code that is not part of fedmeta (see `fedmeta.trust.allow_code`).

    Raises:
        FedmetaError: There is no such run, it cannot be read, or it asks for other code.
    """
    if not run.startswith(REGISTERED):
        path = Path(run)
        if path.is_file():
            return read_start(path, code)
        for folder in (path, path / "data", root / run):
            if (folder / FILE).is_file():
                return MetaModel.read(folder / FILE, code)
        try:
            found = checkpoint.newest(checkpoint.find(root, run, ""))[0]
        except FedmetaError as error:
            if path.is_dir() or (root / run).is_dir():
                raise FedmetaError(f"{run}: neither a run's folder nor a model's ({error})") from None
        else:
            refuse_checkpoint(run)
            return MetaModel.of(found, code)
    return _stored(run, root, uri, code)


def read_start(path: Path, code: Collection[str] = ()) -> MetaModel:
    """Returns what a file of either kind holds: a start, or a checkpoint.

    Args:
        path: The file.
        code: As for `find_start`.

    Raises:
        FedmetaError: It is neither, or asks for other code.
    """
    if path.name == FILE:
        return MetaModel.read(path, code)
    refuse_checkpoint(str(path))
    return MetaModel.of(checkpoint.read(path), code)


def _stored(run: str, root: Path, uri: str, code: Collection[str]) -> MetaModel:
    file = sqlite_file(uri)
    if file is not None and not file.exists():
        where = f"no MLflow store is at {file}" if run.startswith(REGISTERED) else f"{root} has none of that name"
        raise FedmetaError(
            f'no run "{run}": there is no such file or folder, and {where}; '
            "name a run's folder or checkpoint, or the store with --uri"
        )
    with TemporaryDirectory() as folder:
        if run.startswith(REGISTERED):
            return read_start(mlflow_client.fetch_registered(uri, run, Path(folder), FILE), code)
        try:
            file = mlflow_client.fetch_checkpoint(uri, run, Path(folder))
        except FedmetaError as error:
            raise FedmetaError(f'no run "{run}": there is no such file or folder, and {error}') from None
        return read_start(file, code)
