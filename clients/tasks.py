"""What a node hosts where its data are no rows: the tasks of an own source."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clients.errors import DataError, UnknownSiteError
from fedmeta.build import dtype_of
from fedmeta.data import FeatureSums, Standardisation
from fedmeta.data.columns import Categories
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.messages import SitesReply
from fedmeta.minibatches import Minibatches
from fedmeta.noise import noise_keys
from fedmeta.problems import TaskSource
from fedmeta.problems.source import as_dtype, form_of
from fedmeta.task import Batch, Task, stack_trees
from fedmeta.text import first_bad_name

Sites = NDArray[np.int64]

SITES_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class TaskNode:
    """A node's own view of a task source.

    Attributes:
        experiment: The run's description.
        source: Who holds what.
        hosted: The places of the sites that this node answers for, among the source's sorted names.
    """

    experiment: Experiment
    source: TaskSource
    hosted: Sites

    shape = ()

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All names of the source, sorted.

        Raises:
            DataError: The source fails, or two sites have one name.
        """
        names = sorted(str(name) for name in self._ask("sites"))
        if len(set(names)) < len(names):
            raise DataError("the task source names a site twice")
        if bad := first_bad_name(names):
            raise DataError(f"the site {bad}: rename it in the task source")
        return tuple(names)

    def with_categories(self, categories: Categories) -> TaskNode:
        """Returns the node: tasks of an own source have no columns."""
        return self

    def categories(self, sites: Sites, columns: Sequence[str]) -> Categories:
        """Raises `DataError`: tasks of an own source have no columns."""
        raise DataError("an own source's tasks have no columns of categories")

    def describe(self) -> SitesReply:
        """Returns what the node sends of itself when it joins."""
        names = tuple(self.names[site] for site in self.hosted.tolist())
        forms = {form_of(self._task(name, "train", 1)) for name in names[:1]} | {
            form_of(self._task(name, "test", 0)) for name in names[:1]
        }
        ones = (1,) * len(names)
        return SitesReply(
            names=names,
            train_rows=ones,
            test_rows=ones,
            classes=(),
            features=(),
            shape=(),
            regression=True,
            tokens=False,
            weights=tuple(float(self.source.weight(name)) for name in names),
            form="+".join(sorted(forms)) or "none",
            held_out=bool(self.source.held_out),
        )

    def find(self, names: Sequence[str]) -> Sites:
        """Returns the places of named sites; raises `UnknownSiteError` where the node does not host one."""
        places = {self.names[site]: site for site in self.hosted.tolist()}
        try:
            return np.array([places[name] for name in names], dtype=np.int64)
        except KeyError:
            raise UnknownSiteError("a site of another node was asked for") from None

    def sums(self, sites: Sites) -> FeatureSums:
        """Returns sums of nothing: an own source's data are not standardised."""
        return FeatureSums(np.zeros(1), np.zeros(1), np.zeros(1))

    def target_sums(self, sites: Sites) -> FeatureSums:
        """Returns sums of no target."""
        return FeatureSums(np.zeros(0), np.zeros(0), np.zeros(0))

    def weights(self, sites: Sites) -> Tensor:
        """Returns what each site weighs in the mean."""
        if self.experiment.weighs_rows:
            weights = [float(self.source.weight(self.names[site])) for site in sites.tolist()]
            return torch.tensor(weights, dtype=torch.float64).clamp(max=self.experiment.server.max_weight or math.inf)
        return torch.ones(len(sites), dtype=torch.float64)

    def training_batches(
        self,
        sites: Sites,
        round_number: int,
        scale: Standardisation,
        classes: Sequence[str],
        minibatches: Minibatches | None = None,
    ) -> Iterator[tuple[Sites, Batch]]:
        """Yields positions in `sites` and their tasks in a round, all at once."""
        yield np.arange(len(sites)), self.training_batch(sites, round_number, scale, classes)

    def training_batch(
        self,
        sites: Sites,
        round_number: int,
        scale: Standardisation,
        classes: Sequence[str],
        minibatches: Minibatches | None = None,
    ) -> Batch:
        """Returns the tasks of some sites in a round; an own source's data are no rows, and have no mini-batches."""
        return self._stack(sites, "train", round_number)

    def evaluation_batches(
        self, sites: Sites, scale: Standardisation, classes: Sequence[str], purpose: str = "test"
    ) -> Iterator[tuple[Sites, Batch]]:
        """Yields positions in `sites` and their batch."""
        for start in range(0, len(sites), SITES_AT_ONCE):
            group = np.arange(start, min(start + SITES_AT_ONCE, len(sites)))
            yield group, self._stack(sites[group], purpose, 0)

    def _stack(self, sites: Sites, purpose: str, round_number: int) -> Batch:
        names = [self.names[site] for site in sites.tolist()]
        batch = stack_trees([self._task(name, purpose, round_number) for name in names])
        keys = noise_keys(self.experiment.runtime.seed, round_number, names)
        return batch.to(self.experiment.runtime.device).with_noise(keys)

    def _task(self, name: str, purpose: str, round_number: int) -> Task:
        found = self._ask("task", name, purpose, round_number, self.experiment.runtime.seed)
        if not isinstance(found, tuple) or len(found) != 2:
            raise DataError(f"the task source returned {type(found).__name__} for a task, not a fedmeta.Task")
        try:
            form_of(Task(*found))
        except FedmetaError as error:
            raise DataError(str(error)) from error
        return as_dtype(Task(*found), dtype_of(self.experiment))

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self.source, method)(*arguments)
        except Exception as error:  # whatever a user's own code raises
            shown = ", ".join(repr(argument) for argument in arguments)
            raise DataError(f"{type(self.source).__name__}.{method}({shown}) failed: {error}") from error
