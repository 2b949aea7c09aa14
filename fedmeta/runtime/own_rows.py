"""Rows that a Python program holds, in place of files: a frame of all sites, or a torch data set for each.

They are kept in the folder of runs under the name of their content, so that a run of them can be resumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.files import write_atomic

if TYPE_CHECKING:
    import pandas as pd

FOLDER = "frames"
"""The folder of such rows, in that of runs."""


def with_frame(experiment: Experiment, frame: pd.DataFrame, label: str, site: str) -> Experiment:
    """Returns an experiment on the rows of a frame, which is kept as a table.

    Args:
        experiment: The run's description.
        frame: The rows of all sites.
        label: The column of labels; empty for `data.label`.
        site: The column that names each row's site; empty for `data.site_column`.

    Raises:
        FedmetaError: No column names the site, the frame cannot be kept as a table, or the disk does not take it.
    """
    data = experiment.data
    known = {"label": label or data.label, "site_column": site or data.site_column}
    if not known["site_column"]:
        raise FedmetaError("frame: name the column that holds each row's site, site=...")
    content = BytesIO()
    try:
        frame.to_parquet(content, index=False)
    except (ValueError, TypeError, OSError) as error:
        raise FedmetaError(f"frame: cannot be kept as a table: {str(error).splitlines()[0][:200]}") from None
    path = _kept(experiment, content.getvalue(), ".parquet")
    changed = data.model_copy(update={"source": "tables", "path": str(path), **known})
    return experiment.model_copy(update={"data": changed})


def with_datasets(experiment: Experiment, datasets: Mapping[str, Any]) -> Experiment:
    """Returns an experiment on torch data sets, one for each site, which are kept as an npz file.

    Args:
        experiment: The run's description.
        datasets: By the site's name: a `torch.utils.data.Dataset` with a length, or any sequence, of pairs of a row
            [*shape] (tensor, array or number) and its label (a class, a number, or several numbers).

    Raises:
        FedmetaError: A data set is empty or has no such pairs, or rows are of different shapes or kinds of labels.
    """
    if not datasets:
        raise FedmetaError("datasets: give a data set for each site, by the site's name")
    rows: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    owners: list[str] = []
    for name, dataset in datasets.items():
        found = [_pair(name, place, dataset[place]) for place in range(_length(name, dataset))]
        rows += [x for x, _ in found]
        labels += [y for _, y in found]
        owners += [str(name)] * len(found)
    for kind, values in (("rows", rows), ("labels", labels)):
        shapes = {value.shape for value in values}
        if len(shapes) > 1:
            shown = ", ".join(str(shape) for shape in sorted(shapes, key=str)[:3])
            raise FedmetaError(f"datasets: {kind} have different shapes, {shown}: give all of them one shape")
    content = BytesIO()
    # The time of writing is no part of the content, so that the same rows have the same name.
    np.savez(content, x=np.stack(rows), y=np.stack(labels), site=np.array(owners))
    arrays = (np.stack(rows), np.stack(labels), np.array(owners))
    name = blake2b(b"".join(np.ascontiguousarray(each).tobytes() for each in arrays), digest_size=8).hexdigest()
    path = _kept(experiment, content.getvalue(), ".npz", name)
    changed = experiment.data.model_copy(update={"source": "npz", "path": str(path), "site_key": "site"})
    return experiment.model_copy(update={"data": changed})


def _length(name: str, dataset: Any) -> int:
    try:
        length = len(dataset)
    except TypeError:
        raise FedmetaError(f"datasets: {name}: a data set needs a length and items by number") from None
    if not length:
        raise FedmetaError(f"datasets: {name}: there are no rows")
    return length


def _pair(name: str, place: int, item: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns a row and its label as arrays; raises `FedmetaError` where they are no numbers."""
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise FedmetaError(f"datasets: {name}: item {place} is no pair of a row and its label")
    x, y = (np.asarray(each.detach().cpu() if hasattr(each, "detach") else each) for each in item)
    if x.dtype.kind not in "biuf" or y.dtype.kind not in "biufU":
        raise FedmetaError(f"datasets: {name}: item {place} holds {x.dtype} and {y.dtype}, and not numbers and a label")
    return x, y


def _kept(experiment: Experiment, content: bytes, suffix: str, name: str = "") -> Path:
    name = name or blake2b(content, digest_size=8).hexdigest()
    path = Path(experiment.tracking.folder) / FOLDER / f"{name}{suffix}"
    try:
        write_atomic(path, content)
    except OSError as error:
        raise FedmetaError(f"{path}: cannot be written: {error.strerror or error}") from None
    return path
