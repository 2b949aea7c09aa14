"""Who is there: sites by name, the nodes that host them, and what the whole run agrees on."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedmeta.checkpoint import Checkpoint, Evaluation
from fedmeta.data import (
    draw_new_sites,
    draw_validation_sites,
    order_classes,
)
from fedmeta.data.columns import Categories, feature_names
from fedmeta.errors import FedmetaError
from fedmeta.evaluation import NEW, TRAINING, VALIDATION
from fedmeta.experiment import Experiment
from fedmeta.messages import (
    SitesReply,
)
from server import schema

NO_NODE = 0
"""In the place of a node's id, where a site's node is not there; Flower gives no node this one."""

SITE_UNAVAILABLE = "it was not there, or refused, when the run was resumed"
"""Why a site without a node does not answer."""

_FEW = 16
"""Names are looked up one by one where they are fewer than this part of all, and else in a table made for it."""


@dataclass(frozen=True)
class Federation:
    """The sites of a run.

    Attributes:
        names: All sites, sorted by name.
        node_ids: The node that hosts each site, by Flower's unsigned 64-bit id; a site whose node is lost keeps its
        last
            one.
        train_rows: Train rows per site.
        test_rows: Test rows per site.
        new: Whether each site is a new site, which never takes part in training; where `evaluation.judge` is
            "validation_sites", these stand in for the real new sites, which are left out.
        validation: Whether each site is one that only chooses how far to adapt.
        classes: The run's class list, fixed at the start; empty for regression.
        features: Feature names, where rows have them.
        shape: The shape of one row.
        regression: Whether labels are numbers.
        tokens: Whether features are integer codes.
        weights: What each site weighs in the mean with server.weighting = "examples"; fixed when it joined.
        form: A digest of the form of an own source's tasks; empty for rows.
        held_out: Whether support and query are different data.
        targets: What each target of a regression is called; empty for classes.
        categorical: Which features are columns of categories.
        categories: Of each of them the names that the run knows, agreed by what training sites sent.
    """

    names: tuple[str, ...]
    node_ids: NDArray[np.uint64]
    train_rows: NDArray[np.int64]
    test_rows: NDArray[np.int64]
    new: NDArray[np.bool_]
    validation: NDArray[np.bool_]
    classes: tuple[str, ...]
    features: tuple[str, ...]
    shape: tuple[int, ...]
    regression: bool
    tokens: bool
    weights: NDArray[np.float64]
    form: str = ""
    held_out: bool = True
    targets: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    categories: Categories = ()

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of a row as the model has it: a column of categories is as wide as the run knows names of it."""
        if not self.categories:
            return self.shape
        return (len(feature_names(self.features, self.categories)),)

    @property
    def new_sites(self) -> tuple[str, ...]:
        """The names of the new sites."""
        return tuple(self.names[site] for site in np.flatnonzero(self.new))

    @property
    def validation_sites(self) -> tuple[str, ...]:
        """The names of the sites that only choose how far to adapt."""
        return tuple(self.names[site] for site in np.flatnonzero(self.validation))

    def indices(self, names: Sequence[str]) -> NDArray[np.int64]:
        """Returns the indices of named sites."""
        if len(names) < len(self.names) // _FEW:
            return np.array([bisect_left(self.names, name) for name in names], dtype=np.int64)
        places = {name: index for index, name in enumerate(self.names)}
        return np.array([places[name] for name in names], dtype=np.int64)

    @cached_property
    def training(self) -> NDArray[np.int64]:
        """The indices of the training sites that have a train row."""
        return np.flatnonzero(~self.new & ~self.validation & (self.train_rows > 0))

    def kind(self, site: int) -> str:
        """Returns what a site is: "new", "validation" or "training"."""
        return NEW if self.new[site] else VALIDATION if self.validation[site] else TRAINING

    def groups(self, sites: NDArray[np.int64]) -> dict[str, int]:
        """Returns the group of each of some sites (indices) by name: 0 new, 1 training, -1 none of both."""
        kinds = {NEW: 0, TRAINING: 1}
        return {self.names[site]: kinds.get(self.kind(site), -1) for site in sites.tolist()}

    def by_node(self, sites: NDArray[np.int64]) -> dict[int, tuple[str, ...]]:
        """Returns the names of some sites (indices, ascending) by the node that hosts them."""
        shares: dict[int, list[str]] = {}
        for site, home in zip(sites.tolist(), self.node_ids[sites].tolist(), strict=True):
            shares.setdefault(home, []).append(self.names[site])
        return {node: tuple(names) for node, names in shares.items()}


def build_federation(
    replies: Mapping[int, SitesReply], experiment: Experiment, earlier: Checkpoint | None
) -> Federation:
    """Returns the federation of what nodes host, with its new sites drawn, or as a checkpoint fixed them.

    Raises:
        FedmetaError: No site has a train row.
    """
    first = next(iter(replies.values()))
    classes = order_classes(name for reply in replies.values() for name in reply.classes)
    empty = np.array([], dtype=np.int64)
    federation = Federation(
        (),
        empty.astype(np.uint64),
        empty,
        empty,
        empty.astype(bool),
        empty.astype(bool),
        earlier.classes if earlier else classes,
        first.features,
        first.shape,
        first.regression,
        first.tokens,
        empty.astype(float),
        first.form,
        all(reply.held_out for reply in replies.values()),
        first.targets,
        schema.usual_categorical(replies) if earlier is None else tuple(name for name, _ in earlier.categories),
        earlier.categories if earlier else (),
    )
    if earlier and earlier.train_rows:
        federation = add_sites(federation, {NO_NODE: _as_they_joined(earlier)}, as_new=False)
    federation = add_sites(federation, replies, as_new=False)
    if len(federation.training) == 0:
        raise FedmetaError("no site has a train row: give sites more rows, or lower data.test")
    if earlier:
        if uses_validation_sites(experiment):
            federation = only(federation, set(earlier.names))
        known, validation = set(earlier.names) - set(earlier.new_sites), earlier.validation_sites
        return _with_kinds(federation, [name for name in federation.names if name not in known], validation)
    new = draw_new_sites(federation.names, experiment.data.new_sites, experiment.runtime.seed)
    if uses_validation_sites(experiment):
        federation = only(federation, set(federation.names) - set(new))
        new = _split_off(federation, experiment)
    federation = _with_kinds(federation, new, ())
    # How far to adapt is chosen on separate sites, not on those that are scored.
    choosing = experiment.splits_off and len(federation.training) > 1
    return _with_kinds(federation, new, _split_off(federation, experiment)) if choosing else federation


def _as_they_joined(earlier: Checkpoint) -> SitesReply:
    """Returns the sites of a checkpoint, as if one node hosted them all: what the run fixed stays."""
    return SitesReply(
        names=earlier.names,
        train_rows=earlier.train_rows,
        test_rows=earlier.test_rows,
        classes=earlier.classes,
        features=earlier.features,
        shape=earlier.shape,
        regression=earlier.regression,
        tokens=earlier.tokens,
        weights=earlier.weights,
        form=earlier.form,
        held_out=earlier.held_out,
        targets=earlier.targets,
        categorical=tuple(name for name, _ in earlier.categories),
    )


def uses_validation_sites(experiment: Experiment) -> bool:
    """Returns whether validation sites stand in for the new ones."""
    return experiment.evaluation.judge == "validation_sites"


def judges(federation: Federation, experiment: Experiment) -> NDArray[np.int64]:
    """Returns the sites by whose scores a run decides while it trains.

    They are the validation sites. A run that decides about its order alone has none: a seeded draw of as many training
    sites judges on test rows, which no training sees, so that no site is lost to training.
    """
    if federation.validation.any():
        return np.flatnonzero(federation.validation)
    judged = federation.training[federation.test_rows[federation.training] > 0]
    if len(judged) < 2:
        return judged
    names = [federation.names[site] for site in judged]
    return federation.indices(
        draw_validation_sites(names, experiment.evaluation.validation_sites, experiment.runtime.seed)
    )


def _split_off(federation: Federation, experiment: Experiment) -> tuple[str, ...]:
    """Returns the training sites that are split off to choose or to evaluate on."""
    names = [federation.names[site] for site in federation.training]
    return draw_validation_sites(names, experiment.evaluation.validation_sites, experiment.runtime.seed)


def only(federation: Federation, names: Set[str]) -> Federation:
    """Returns the federation of those sites alone whose names these are."""
    kept = np.array([name in names for name in federation.names], dtype=bool)
    return replace(
        federation,
        names=tuple(name for name in federation.names if name in names),
        node_ids=federation.node_ids[kept],
        train_rows=federation.train_rows[kept],
        test_rows=federation.test_rows[kept],
        weights=federation.weights[kept],
        new=federation.new[kept],
        validation=federation.validation[kept],
    )


def _with_kinds(federation: Federation, new: Sequence[str], validation: Sequence[str]) -> Federation:
    masks = np.zeros((2, len(federation.names)), dtype=bool)
    for mask, kind in zip(masks, (new, validation), strict=True):
        mask[federation.indices(kind)] = True
    return replace(federation, new=masks[0], validation=masks[1])


def add_sites(federation: Federation, replies: Mapping[int, SitesReply], *, as_new: bool) -> Federation:
    """Returns the federation with what nodes host; where two claim one site, the later one is believed.

    Rows and weights are fixed when a site joins: of one that comes back, those that it announced first stay.
    """
    everyone = [*federation.names, *(name for reply in replies.values() for name in reply.names)]
    nodes = (np.full(len(reply.names), node, dtype=np.uint64) for node, reply in replies.items())
    train = (np.array(reply.train_rows, dtype=np.int64) for reply in replies.values())
    test = (np.array(reply.test_rows, dtype=np.int64) for reply in replies.values())
    weights = (np.array(reply.weights or reply.train_rows, dtype=np.float64) for reply in replies.values())
    said_last = {name: place for place, name in enumerate(everyone)}
    names = tuple(sorted(said_last))
    last = np.array([said_last[name] for name in names], dtype=np.int64)
    said_first = {name: place for place, name in reversed([*enumerate(everyone)])}
    first = np.array([said_first[name] for name in names], dtype=np.int64)
    grown = replace(
        federation,
        names=names,
        node_ids=np.concatenate([federation.node_ids, *nodes])[last],
        train_rows=np.concatenate([federation.train_rows, *train])[first],
        test_rows=np.concatenate([federation.test_rows, *test])[first],
        weights=np.concatenate([federation.weights, *weights])[first],
    )
    known = grown.indices(federation.names)
    new, validation = np.full(len(names), as_new), np.zeros(len(names), dtype=bool)
    new[known], validation[known] = federation.new, federation.validation
    return replace(grown, new=new, validation=validation)


def remap_site_indices(
    evaluations: Sequence[Evaluation], names: tuple[str, ...], federation: Federation
) -> list[Evaluation]:
    """Returns evaluations whose sites are indices into `names` as ones into the federation's, which sites may join."""
    # Every round asks, and comparing a million names takes longer than the rest of the round's bookkeeping.
    if names is federation.names or names == federation.names:
        return list(evaluations)
    places = federation.indices(names)
    return [replace(evaluation, sites=places[evaluation.sites]) for evaluation in evaluations]
