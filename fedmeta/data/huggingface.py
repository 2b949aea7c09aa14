"""Sites from a data set in Hugging Face's form, dealt by the partitioners of flwr-datasets: the extra `huggingface`.

A path that is no folder here is the name of a data set on the hub, which is downloaded on first use.
"""

import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedmeta.data.arrays import build_population
from fedmeta.data.labels import encode_labels
from fedmeta.data.population import ArrayPopulation
from fedmeta.errors import FedmetaError, nearest
from fedmeta.experiment import Data

try:
    import datasets
    from flwr_datasets import FederatedDataset
    from flwr_datasets.partitioner import DirichletPartitioner, NaturalIdPartitioner
except ImportError as error:
    raise FedmetaError(
        f'data.source = "huggingface" needs a package ({error}): pip install "fedmeta[huggingface]"'
    ) from None

_SEED = 0
"""The population is a data set, the same in every run; a run's seed draws who trains and on what."""

_ROW = "fedmeta row"
"""A column that is added: the number of each row, by which a partition's rows are known again."""

_BROKEN = (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError)


class _Features(NamedTuple):
    x: NDArray[Any]
    names: tuple[str, ...]


def load_huggingface(data: Data) -> ArrayPopulation:
    """Returns the population of a data set: a name on the hub, a folder of files, or a folder of `save_to_disk`.

    Rows are those of the split `data.part`, or all where a saved data set has no splits. A site is a value of column
    `data.site_key`; or, with `data.dirichlet`, one of `data.sites` sites to which each label's rows are dealt in
    proportions from a Dirichlet distribution (Hsu, Qi and Brown 2019). Column `data.label` is the label; features are
    `data.columns`, or all other columns: numbers, or one column of images or arrays of one shape.

    Raises:
        FedmetaError: The data set, a split, a column or a cell is not as it should be.
    """
    with _quiet(), _explained(data.path):
        partitioner = _partitioner(data)
    rows = partitioner.dataset.with_format("numpy")
    labels = _whole(rows, data.label_names[0], "data.label", data.path)
    if data.dirichlet is None:
        _whole(rows, data.site_key, "data.site_key", data.path)
    with _quiet(), _explained(data.path):
        shares = [partitioner.load_partition(site)[_ROW] for site in range(partitioner.num_partitions)]
    owners = np.empty(len(rows), dtype=np.int64)
    for site, share in enumerate(shares):
        owners[np.asarray(share, dtype=np.int64)] = site
    features = _features(rows, data)
    kind = rows.features[data.label_names[0]]

    def cell(row: int, column: int) -> str:
        return _place(data.path, row, features.names[column] if features.names else f"pixel {column}")

    return build_population(
        data.path,
        features.x,
        encode_labels(
            labels,
            lambda row: _place(data.path, row, data.label_names[0]),
            data.task,
            data.binarise,
            kind.names if isinstance(kind, datasets.ClassLabel) and data.binarise is None else None,
            data.target,
            data.label_names,
        ),
        owners,
        _site_names(partitioner, len(shares)),
        cell,
        feature_names=features.names,
        min_rows=data.min_rows,
    )


def _partitioner(data: Data) -> Any:
    """Returns the partitioner of the sites, with the numbered data set in it."""
    if data.dirichlet is None:
        partitioner = NaturalIdPartitioner(partition_by=data.site_key)
    else:
        partitioner = DirichletPartitioner(
            data.sites, data.label_names[0], data.dirichlet, min_partition_size=0, self_balancing=False, seed=_SEED
        )
    folder = Path(data.path).expanduser()
    if not any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        return FederatedDataset(
            dataset=str(folder.absolute()) if folder.exists() else data.path,
            subset=data.subset or None,
            partitioners={data.part: partitioner},
            preprocessor=_numbered,
            shuffle=False,
        ).partitioners[data.part]
    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.Dataset):
        saved = datasets.DatasetDict({data.part: saved})
    if data.part not in saved:
        raise FedmetaError(f'{data.path}: no split "{data.part}" (data.part); it has {", ".join(saved)}')
    partitioner.dataset = _numbered(saved)[data.part]
    return partitioner


def _numbered(splits: Any) -> Any:
    """Returns the splits of a data set with the number of each row as a further column."""
    return datasets.DatasetDict(
        {name: rows.add_column(_ROW, np.arange(len(rows), dtype=np.int64)) for name, rows in splits.items()}
    )


def _site_names(partitioner: Any, sites: int) -> list[str]:
    if isinstance(partitioner, NaturalIdPartitioner):
        return [str(partitioner.partition_id_to_natural_id[site]) for site in range(sites)]
    width = len(str(sites - 1))
    return [f"site-{site:0{width}d}" for site in range(sites)]


def _features(rows: Any, data: Data) -> _Features:
    """Returns the feature columns side by side, or the one column of images or arrays."""
    others = [name for name in rows.column_names if name not in (_ROW, data.label_names[0], data.site_key)]
    columns = list(data.columns) or others
    if not columns:
        raise FedmetaError(f"{data.path}: there is no feature column beside label and site")
    arrays = [_numbers(rows, name, data.path) for name in columns]
    if len(arrays) == 1 and arrays[0].ndim > 2:
        return _Features(arrays[0], ())
    for name, array in zip(columns, arrays, strict=True):
        if array.ndim > 2:
            raise FedmetaError(f'{data.path}: column "{name}" holds images or arrays: name it alone in data.columns')
    flat = [array.reshape(len(array), -1) for array in arrays]
    names = [
        name if array.ndim == 1 else f"{name}[{place}]"
        for name, array in zip(columns, arrays, strict=True)
        for place in range(1 if array.ndim == 1 else array.shape[1])
    ]
    return _Features(np.concatenate(flat, axis=1), tuple(names))


def _numbers(rows: Any, name: str, path: str) -> NDArray[Any]:
    """Returns a feature column as numbers [rows, ...], NaN = missing."""
    values = _column(rows, name, "data.columns", path)
    if values.dtype.kind == "O":
        with contextlib.suppress(TypeError, ValueError):
            values = np.array([np.nan if value is None else value for value in values.tolist()], dtype=np.float64)
    if values.dtype.kind not in "biuf":
        raise FedmetaError(
            f'{path}: column "{name}" is {rows.features[name]}, or not of one shape in all rows: features must be '
            "numbers, or images of one size; list others in data.columns"
        )
    return values


def _whole(rows: Any, name: str, key: str, path: str) -> NDArray[Any]:
    """Returns a column of numbers or texts, none of which is missing."""
    values = _column(rows, name, key, path)
    if values.ndim != 1:
        raise FedmetaError(f'{path}: column "{name}" ({key}) must hold one number or text per row')
    absent = [place for place, value in enumerate(values.tolist()) if value is None or value != value]
    if absent:
        raise FedmetaError(f"{_place(path, absent[0], name)} is missing: every row needs one")
    return values.astype(str) if values.dtype.kind == "O" else values


def _column(rows: Any, name: str, key: str, path: str) -> NDArray[Any]:
    there = [column for column in rows.column_names if column != _ROW]
    if name not in there:
        raise FedmetaError(f'{path}: no column "{name}" ({key}); it has {", ".join(there)}{nearest(name, there)}')
    with _quiet(), _explained(path):
        return np.asarray(rows[name][:])


def _place(path: str, row: int, column: str) -> str:
    return f'{path}: row {row} (from 0), column "{column}"'


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turns what the libraries raise on data that they cannot read into an error of one line."""
    try:
        yield
    except FedmetaError:
        raise
    except _BROKEN as error:
        given = " ".join(str(error).split())[:300] or type(error).__name__
        raise FedmetaError(f"data.path: {path} cannot be read as a Hugging Face data set: {given}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the libraries' progress bars off stderr where that is no terminal."""
    with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
        yield
