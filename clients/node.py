"""What a node hosts: its sites' rows, and the learner that works on them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from flwr.app import Context
from numpy.typing import NDArray
from torch import Tensor

from clients.errors import DataError, UnknownSiteError
from clients.policy import is_deployed
from clients.tasks import TaskNode
from fedmeta.build import dtype_of, learner_of, load_code, source_of
from fedmeta.data import (
    ArrayPopulation,
    Episodes,
    FeatureSums,
    Population,
    Split,
    Standardisation,
    class_codes,
    evaluation_episodes,
    evaluation_tasks,
    gather,
    gram_matrices,
    group_by_size,
    left_out,
    load_site,
    split,
    standardised,
    target_sums,
    train_sums,
    training_episodes,
    training_order,
    training_tasks,
)
from fedmeta.data.columns import Categories, encoded, frequent_names
from fedmeta.data.stream_split import stream_split
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Data, Experiment
from fedmeta.learners import Learner
from fedmeta.messages import SitesReply
from fedmeta.minibatches import Minibatches
from fedmeta.noise import noise_keys
from fedmeta.problems import TaskSource
from fedmeta.problems.multilabel import NAME as MULTILABEL
from fedmeta.problems.multilabel import check_labels
from fedmeta.targets import TargetScale
from fedmeta.task import Batch
from fedmeta.trust import BY_NODE_CONFIG, allow_code, refuse_foreign_code, without_own_files

Sites = NDArray[np.int64]

GROUP_ROWS = 1 << 14
"""How many padded rows an evaluation gathers at once."""

TRAINING_BYTES = 1 << 28
"""Bytes of features that a round gathers at once where learners take all train rows of their sites."""

LINEAR = ("logistic", "mlp")
"""Models whose first layer is a linear one on the whole row."""


@dataclass(frozen=True)
class RowNode:
    """A node's own view: the sites that it hosts, of a population of rows that it can read.

    Attributes:
        experiment: The run's description.
        population: The sites that the node's data hold.
        split: Their train and test rows.
        hosted: The numbers of the sites that this node answers for: all, or in simulation a share.
    """

    experiment: Experiment
    population: Population
    split: Split
    hosted: Sites

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one row."""
        return tuple(self.population.shape)

    def describe(self) -> SitesReply:
        """Returns what the node sends of itself when it joins."""
        population = self.population
        train_rows, test_rows = self.split.joining_sizes(self.hosted)
        if self.experiment.privacy.secure_aggregation:  # how many rows a site has is its own affair then
            train_rows, test_rows = np.minimum(train_rows, 1), np.minimum(test_rows, 1)
        return SitesReply(
            names=population.names_of(self.hosted),
            train_rows=tuple(train_rows.tolist()),
            test_rows=tuple(test_rows.tolist()),
            classes=self.classes(),
            features=tuple(population.feature_names),
            shape=tuple(population.shape),
            regression=population.regression,
            tokens=population.tokens,
            targets=population.target_names or tuple(f"y{number}" for number in range(population.targets)),
            weights=tuple(train_rows.astype(np.float64).tolist()),
            categorical=self.categorical,
        )

    @property
    def categorical(self) -> tuple[str, ...]:
        """The features that are columns of categories here."""
        population = self.population
        return tuple(name for name, _ in population.categories) if isinstance(population, ArrayPopulation) else ()

    def categories(self, sites: Sites, columns: Sequence[str]) -> Categories:
        """Returns the names in columns of categories that enough train rows of one of some sites have."""
        population = self.population
        if not isinstance(population, ArrayPopulation) or not set(columns) <= set(population.feature_names):
            raise DataError("categories of columns were asked for that are not here")
        rows = [self.split.train_rows(sites[place : place + 1]).rows for place in range(len(sites))]
        fewest = self.experiment.data.category_rows
        return tuple((column, frequent_names(population, column, rows, fewest)) for column in columns)

    def with_categories(self, categories: Categories) -> RowNode:
        """Returns the node with the features that a run makes of columns of categories."""
        population = self.population
        if not isinstance(population, ArrayPopulation):
            return self
        try:
            found = encoded(population, categories)
        except FedmetaError as error:
            raise DataError(str(error)) from error
        return (
            self
            if found is population
            else replace(self, population=found, split=replace(self.split, population=found))
        )

    def find(self, names: Sequence[str]) -> Sites:
        """Returns the numbers of named sites; raises `UnknownSiteError` where the node does not host one."""
        try:
            sites = self.population.find(names)
        except FedmetaError as error:
            raise UnknownSiteError(str(error)) from None
        places = np.searchsorted(self.hosted, sites)
        if not np.array_equal(self.hosted[np.minimum(places, len(self.hosted) - 1)], sites):
            raise UnknownSiteError("a site of another node was asked for")
        return sites

    def classes(self) -> tuple[str, ...]:
        """Returns the labels that occur at the hosted sites; all symbols of a text, all numbers of few-shot tasks."""
        of_source = self.population.regression or self.population.tokens or self.experiment.data.ways
        if of_source or len(self.hosted) == len(self.population):
            return self.population.class_names
        codes = np.unique(self.population.labels(self.population.rows(self.hosted).rows))
        return tuple(self.population.class_names[code] for code in codes)

    def sums(self, sites: Sites) -> FeatureSums:
        """Returns the feature sums over the sites' train rows."""
        return train_sums(self.split, sites, self.experiment.data.standardise)

    def target_sums(self, sites: Sites) -> FeatureSums:
        """Returns the sums of the targets over the sites' train rows; of no target for classes."""
        try:
            return target_sums(self.split, sites, self.experiment.target_kind)
        except FedmetaError as error:
            raise DataError(str(error)) from error

    def weights(self, sites: Sites) -> Tensor:
        """Returns what each site weighs in the mean: 1, or its number of train rows."""
        if self.experiment.weighs_rows:
            sizes = torch.from_numpy(self.split.joining_sizes(sites)[0].astype(np.float64))
            return sizes.clamp(max=self.experiment.server.max_weight or math.inf)
        return torch.ones(len(sites), dtype=torch.float64)

    def training_batches(
        self,
        sites: Sites,
        round_number: int,
        scale: Standardisation,
        classes: Sequence[str],
        minibatches: Minibatches | None = None,
    ) -> Iterator[tuple[Sites, Batch]]:
        """Yields positions in `sites` and their tasks in a round: all at once, unless padding would take much memory.

        Args:
            sites: The cohort's sites that are here.
            round_number: The round.
            scale: The run's standardisation.
            classes: The run's class list.
            minibatches: How the learner goes through all of a site's train rows; None for support and query rows.
        """
        groups = [np.arange(len(sites))]
        sizes = self.split.train_sizes(sites)
        if minibatches is not None and not self.experiment.data.ways and len(sites):
            most = max(1, TRAINING_BYTES // (4 * int(np.prod(self.shape, dtype=np.int64))))
            if len(sites) * int(sizes.max()) > most:
                groups = group_by_size(sizes, most)
        for group in groups:
            yield group, self.training_batch(sites[group], round_number, scale, classes, minibatches)

    def training_batch(
        self,
        sites: Sites,
        round_number: int,
        scale: Standardisation,
        classes: Sequence[str],
        minibatches: Minibatches | None = None,
    ) -> Batch:
        """Returns the tasks of some sites in a round; arguments as for `training_batches`."""
        data = self.experiment.data
        if data.ways:
            episodes = training_tasks(self.split, sites, round_number, data)
        else:
            query = data.query if minibatches is None else int(self.split.train_sizes(sites).max(initial=1))
            episodes = training_episodes(self.split, sites, round_number, data.support, query)
        batch = self._gather(episodes, scale, classes).with_noise(self._noise(sites, round_number))
        if minibatches is None:
            return batch
        order = training_order(self.split, sites, round_number, episodes, minibatches)
        return replace(batch, order=torch.from_numpy(order).to(batch.device))

    def _noise(self, sites: Sites, round_number: int, tasks: int = 1) -> Tensor:
        """Returns the keys of the noise of sites' tasks [sites * tasks] in a round; 0 is evaluation."""
        names = self.population.names_of(sites)
        return noise_keys(self.experiment.runtime.seed, round_number, names).repeat_interleave(tasks)

    def evaluation_batches(
        self, sites: Sites, scale: Standardisation, classes: Sequence[str]
    ) -> Iterator[tuple[Sites, Batch]]:
        """Yields positions in `sites` and their batch, in groups of similar size that bound padding and memory.

        With `data.ways` a batch holds several tasks of each site, one after another; else one.
        """
        data = self.experiment.data
        tasks = self.experiment.evaluation.tasks if data.ways else 1
        for group in group_by_size(self.split.test_sizes(sites) * tasks, GROUP_ROWS):
            if data.ways:
                episodes = evaluation_tasks(self.split, sites[group], tasks, data)
            else:
                episodes = evaluation_episodes(self.split, sites[group], data.support)
            yield group, self._gather(episodes, scale, classes).with_noise(self._noise(sites[group], 0, tasks))

    def _gather(self, episodes: Episodes, scale: Standardisation, classes: Sequence[str]) -> Batch:
        codes = class_codes(self.population.class_names, classes)
        dtype = dtype_of(self.experiment)
        population, pairs = self.population, None
        # Several nodes that host a share each would have a copy of all rows in every process.
        if episodes.support.turns is None and len(self.hosted) == len(population):
            population, scale = standardised(population, scale, dtype)
            if self.experiment.model.name in LINEAR:
                pairs = gram_matrices(population, scale, dtype)
        return gather(population, episodes, scale, codes, dtype, pairs).to(self.experiment.runtime.device)


Node = RowNode | TaskNode
"""What a node hosts: rows, or the tasks of an own source."""


def node_of(context: Context) -> Node:
    """Returns what the node of a context hosts.

    A deployed node's config names its site and its file (`site`, `data`); a simulated one's has which share of the
    experiment's sites it hosts (`partition-id`, `num-partitions`): every `num-partitions`-th site by name. A deployed
    node imports code of the user's own only from the packages that its config allows (`code`), and without `data` it
    reads nothing: the paths of an experiment are for the machine of the person who wrote it.

    Raises:
        DataError: The data cannot be read, or a deployed node has none.
        FedmetaError: The experiment is not valid, or names code that this node does not allow.
    """
    experiment = _experiment(str(context.run_config["experiment"]))
    config = context.node_config
    if is_deployed(config):
        allowed = allow_code([str(config.get("code", ""))], origin="node config: code")
        refuse_foreign_code(experiment, "run config: experiment", allowed, remedy=BY_NODE_CONFIG)
        experiment = without_own_files(experiment)
    if "data" in config:
        return _site_node(experiment, str(config["data"]), str(config.get("site", "")))
    if is_deployed(config):
        raise DataError('node config: data is missing: name the site\'s file, site="NAME" data="FILE"')
    return _partition_node(experiment, int(config.get("partition-id", 0)), int(config.get("num-partitions", 1)))


def learner_for(node: Node, classes: tuple[str, ...]) -> Learner:
    """Returns the run's learner, for the run's class list (empty for regression)."""
    targets = node.population.targets if isinstance(node, RowNode) else 0
    return _learner(node.experiment, node.shape, classes, targets)


def split_meta_state(
    meta_state: Mapping[str, Tensor], device: str, *, log_targets: bool = False
) -> tuple[dict[str, Tensor], Standardisation]:
    """Returns the learned part of a meta-state, on a device, and its standardisation.

    Args:
        meta_state: The meta-state.
        device: "cpu" or "cuda".
        log_targets: Whether it is the logarithm of targets that is standardized.

    Raises:
        FedmetaError: The device is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise FedmetaError('[runtime] device = "cuda": there is no CUDA device here; use "cpu"')
    learned = {name: v.to(device) for name, v in meta_state.items() if not name.startswith("standardisation.")}
    mean, scale = (meta_state[f"standardisation.{name}"].float().numpy() for name in ("mean", "scale"))
    target = TargetScale.of(meta_state, log=log_targets)
    numbers = (each.tobytes() for each in (mean, scale, target.mean, target.scale))
    return learned, _standardisation(mean.shape, *numbers, target.log)


@lru_cache(maxsize=4)
def _standardisation(
    shape: tuple[int, ...], mean: bytes, scale: bytes, target_mean: bytes, target_scale: bytes, log: bool
) -> Standardisation:
    """Returns the same object for the same numbers, which a run sends in every message."""
    features = [np.frombuffer(each, np.float32).reshape(shape).copy() for each in (mean, scale)]
    targets = [np.frombuffer(each, np.float64).copy() for each in (target_mean, target_scale)]
    return Standardisation(features[0], features[1], TargetScale(targets[0], targets[1], log))


@lru_cache(maxsize=4)
def _experiment(text: str) -> Experiment:
    return Experiment.from_toml(text, origin="run config: experiment").without_weights()


def invalidate_stale_caches(data: Data) -> None:
    """Lets what was read of an experiment's data go where its files have changed since: a new run reads them again."""
    path = Path(data.path).expanduser()
    files = sorted(path.iterdir()) if path.is_dir() else [path] if data.path and path.exists() else []
    found = [(file.name, file.stat()) for file in files]
    stamp = tuple((name, facts.st_ino, facts.st_mtime_ns, facts.st_size) for name, facts in found)
    if _stamps.setdefault(data.path, stamp) != stamp:
        _stamps[data.path] = stamp
        _source.cache_clear()
        _partition_node.cache_clear()
        standardised.cache_clear()
        gram_matrices.cache_clear()


_stamps: dict[str, tuple[tuple[str, int, int, int], ...]] = {}
"""The files of each path, and their state, when they were last read."""


@lru_cache(maxsize=2)
def _source(experiment: Experiment) -> Population | TaskSource:
    try:
        return source_of(experiment)
    except FedmetaError as error:
        raise DataError(str(error)) from error


@lru_cache(maxsize=8)
def _partition_node(experiment: Experiment, partition: int, partitions: int) -> Node:
    source = _source(experiment.for_source())
    if isinstance(source, TaskSource):
        node = TaskNode(experiment, source, np.arange(len(source.sites())))
        without, _ = left_out(node.names, experiment.data.without)
        kept = np.array([place for place, name in enumerate(node.names) if name not in without], dtype=np.int64)
        return replace(node, hosted=kept[partition::partitions])
    _check_labels(experiment, source)
    hosted = np.arange(partition, len(source), partitions)
    return RowNode(experiment, source, _rows(source, experiment), hosted)


@lru_cache(maxsize=8)
def _site_node(experiment: Experiment, path: str, site: str) -> Node:
    try:
        own = ":" in experiment.data.source or _is_own_source(experiment)
        source = source_of(experiment, path=path, site=site) if own else load_site(experiment.data, path, site)
    except FedmetaError as error:
        raise DataError(str(error)) from error
    if isinstance(source, TaskSource):
        return TaskNode(experiment, source, np.arange(len(source.sites())))
    _check_labels(experiment, source)
    return RowNode(experiment, source, _rows(source, experiment), np.arange(len(source)))


def _rows(source: Population, experiment: Experiment) -> Split:
    """Returns which rows of each site train and which test: by share, or of a stream as it begins."""
    if experiment.stream.block:
        return stream_split(source, experiment)
    return split(source, experiment.data, experiment.runtime.seed)


def _check_labels(experiment: Experiment, population: Population) -> None:
    """Checks the labels of a problem that takes 0 and 1 alone; raises `DataError` where there are others."""
    if experiment.problem.name != MULTILABEL:
        return
    if not isinstance(population, ArrayPopulation) or not population.regression:
        raise DataError("MultiLabel needs labels that are numbers: list several columns of 0 and 1 in data.label")
    owner = np.zeros(len(population.y), dtype=np.int64)
    for site in population.all_sites.tolist():
        owner[population.rows(np.array([site])).rows] = site
    try:
        names = experiment.data.label_names
        check_labels(population.y, names, lambda row: f"site {population.names[owner[row]]}")
    except FedmetaError as error:
        raise DataError(str(error)) from error


def _is_own_source(experiment: Experiment) -> bool:
    """Returns whether the problem is the task source too."""
    name = experiment.problem.name
    if ":" not in name:
        return False
    factory = load_code(name, "[problem] name")
    return isinstance(factory, type) and issubclass(factory, TaskSource)


@lru_cache(maxsize=4)
def _learner(experiment: Experiment, shape: tuple[int, ...], classes: tuple[str, ...], targets: int) -> Learner:
    return learner_of(experiment, shape, classes, targets)
