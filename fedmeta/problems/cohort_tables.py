"""A task source of tables, one a site, for problems whose outcome is more than a label: a time and an event, a count.

A site's rows are split once into train and test rows by a draw under the run's seed; a training task is a draw of
disjoint support and query rows of the former. Tasks have one form: rows that a site lacks are padding, with `mask` 0.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmeta.data.refusals import listed
from fedmeta.data.table_file import RawTable, read_raw, site_name
from fedmeta.errors import FedmetaError, nearest
from fedmeta.experiment import Data
from fedmeta.problems.problem import Parameters
from fedmeta.problems.source import TaskSource
from fedmeta.randomness import row_draws, site_keys
from fedmeta.task import Task

Table = dict[str, NDArray[np.float64]]
"""A site's columns [rows]."""


def read_tables(
    path: str, features: Sequence[str], others: Sequence[str] = (), site: str = "", missing: Sequence[str] = ()
) -> dict[str, Table]:
    """Returns the columns of each site's table: of a folder's files, or of one file.

    Args:
        path: A folder of CSV, TSV or Parquet files, one a site, or one site's file.
        features: The columns of features; all must be numbers, and none missing.
        others: The columns of the outcome.
        site: The name of a single file's site; that of the file where empty.
        missing: Texts that mean a missing value, besides the usual ones.

    Raises:
        FedmetaError: There is no such file, a column is missing, or a cell is no number; names all that is wrong.
    """
    place = Path(path).expanduser()
    files = sorted(each for each in place.iterdir() if each.is_file()) if place.is_dir() else [place]
    files = [each for each in files if not each.name.startswith(".")]
    if not place.exists() or not files:
        raise FedmetaError(f"[problem] path = {path}: no such file, or a folder without any")
    found, problems = {}, []
    for file in files:
        table = read_raw(file, Data(missing=(*Data().missing, *missing)))
        problems += table.problems or _wrong(table, [*features, *others])
        if not problems:
            name = site if site and len(files) == 1 else site_name(file)
            found[name] = {each: table.frame[each].to_numpy(dtype=np.float64) for each in (*features, *others)}
    if problems:
        raise FedmetaError("; ".join(problems))
    return found


def _wrong(table: RawTable, columns: Sequence[str]) -> list[str]:
    """Returns what is wrong with the columns of a file that a problem needs."""
    there = [str(name) for name in table.frame.columns]
    absent = [name for name in columns if name not in there]
    if absent:
        return [f"{table.path} lacks {listed(absent)}{nearest(absent[0], there)}"]
    found = []
    for name in columns:
        bad = ~np.isfinite(
            pd.to_numeric(table.frame[name], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
        )
        if bad.any():
            found.append(
                f"{table.place(np.flatnonzero(bad).tolist(), name)} is no finite number: fill it in, or leave it out"
            )
    return found


class CohortTables(TaskSource):
    """Sites with tables of features and an outcome; subclass it and give `outcome`.

    Args:
        path: A folder with a table for each site, or one site's file; empty for simulated sites.
        site: The name of a single file's site.
        simulated: Returns each simulated site's columns; called where no path is given and rows are asked for.
        features: The columns of features.
        others: The columns of the outcome.
        support: Rows that a site adapts on.
        query: Rows that score it in training.
        test: The share of rows that are kept for the final scores.
        center: What is subtracted from each feature, known to all sites beforehand; 0 each where empty.
        scale: What features are then divided by; 1 each where empty.
        most_test: The length that test rows are padded to, for nodes that read their own site alone; 0 = as many as
            the longest table has rows.
    """

    def __init__(
        self,
        path: str,
        site: str,
        simulated: Callable[[], Mapping[str, Table]],
        features: Sequence[str],
        others: Sequence[str],
        support: int,
        query: int,
        test: float,
        center: Sequence[float] = (),
        scale: Sequence[float] = (),
        most_test: int = 0,
    ) -> None:
        for key, values in (("center", center), ("scale", scale)):
            if values and len(values) != len(features):
                raise FedmetaError(f"[problem] {key} has {len(values)} numbers, and there are {len(features)} features")
        if not 0 < test < 1 or min(support, query) < 1 or not features:
            raise FedmetaError("[problem] needs features, support and query of at least 1, and 0 < test < 1")
        shift, unit = np.array(center or [0.0] * len(features)), np.array(scale or [1.0] * len(features))
        if not (unit > 0).all():
            raise FedmetaError("[problem] scale must be greater than 0")
        self.support, self.query, self.test, self.most_test = support, query, test, most_test
        self.features, self.shift, self.unit, self.scaled = tuple(features), shift, unit, bool(scale)
        self.width, self.simulated = len(features), simulated
        if path:
            self.rows = self._tensors(read_tables(path, features, others, site))

    @cached_property
    def rows(self) -> dict[str, dict[str, Tensor]]:
        """Each site's tensors [rows] by name; of simulated sites, where no path was given."""
        tables = self.simulated()
        if absent := [name for name in self.features if name not in next(iter(tables.values()))]:
            raise FedmetaError(f"[problem] path is not set, and simulated sites have no {listed(absent)}")
        return self._tensors(tables)

    def _tensors(self, tables: Mapping[str, Table]) -> dict[str, dict[str, Tensor]]:
        found = {}
        for name, table in tables.items():
            x = self.standardized(table)
            found[name] = {"x": x, **self.outcome(name, table)}
            if len(x) < 3:
                raise FedmetaError(
                    f"site {name} has {len(x)} rows, and needs 3: one each to adapt, to score and to test"
                )
        return found

    def standardized(self, table: Table) -> Tensor:
        """Returns a table's features [rows, features], shifted and scaled."""
        x = (np.stack([table[each] for each in self.features], axis=1) - self.shift) / self.unit
        return torch.from_numpy(x).float()

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns that a prediction needs: the features, and further ones but the outcome."""
        return self.features

    @abstractmethod
    def predicted(self, parameters: Parameters, table: Table) -> dict[str, NDArray[np.float64]]:
        """Returns what the problem predicts for each row of a table with the columns `needed`, by name."""

    @abstractmethod
    def outcome(self, site: str, table: Table) -> dict[str, Tensor]:
        """Returns the outcome's tensors [rows] by name; raises `FedmetaError` where a value is impossible."""

    @staticmethod
    def mean(values: Tensor, data: Mapping[str, Tensor]) -> Tensor:
        """Returns the mean of values [n] over the rows that are no padding."""
        return (values * data["mask"]).sum() / data["mask"].sum()

    def sites(self) -> list[str]:
        """Returns the sites' names, sorted."""
        return sorted(self.rows)

    def task(self, site: str, purpose: str, round: int, seed: int) -> Task:  # noqa: A002 - the task source's name
        """Returns support and query rows of a site; of "test" the query is all test rows."""
        count = len(self.rows[site]["x"])
        keys, places = site_keys([site]).repeat(count), np.arange(count)
        order = np.argsort(row_draws(seed, "split", 0, keys, places), kind="stable")
        held = max(1, min(count - 2, round_half(self.test * count)))
        test, train = order[:held], order[held:]
        if purpose == "train":
            train = train[np.argsort(row_draws(seed, "task", round, keys[: len(train)], places[: len(train)]))]
        support = train[: min(self.support, len(train) - 1)]
        if purpose == "test":
            longest = self.most_test or max(len(each["x"]) for each in self.rows.values())
            if len(test) > longest:
                raise FedmetaError(f"site {site} has {len(test)} test rows, above [problem] most_test = {longest}")
            return Task(self._part(site, support, self.support), self._part(site, test, longest))
        query = train[len(support) : len(support) + self.query]
        return Task(self._part(site, support, self.support), self._part(site, query, self.query))

    def _part(self, site: str, rows: NDArray[np.int64], length: int) -> dict[str, Tensor]:
        index = torch.from_numpy(np.pad(rows, (0, max(0, length - len(rows)))))
        mask = (torch.arange(len(index)) < len(rows)).float()
        return {name: values[index] for name, values in self.rows[site].items()} | {"mask": mask}


def round_half(value: float) -> int:
    """Returns the nearest whole number, halves up."""
    return int(value + 0.5)
