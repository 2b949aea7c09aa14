"""Who is there: sites by name, the nodes that host them, and what the whole run agrees on."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property, reduce

import numpy as np
import torch
from flwr.app import RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray
from torch import Tensor

from fedmeta.checkpoint import Checkpoint, Evaluation
from fedmeta.data import (
    FeatureSums,
    draw_new_sites,
    draw_validation_sites,
    order_classes,
    standardisation,
    target_scale,
)
from fedmeta.data.columns import MOST_NAMES, Categories, feature_names
from fedmeta.data.sums import median_sums, statistic_shape
from fedmeta.errors import FedmetaError
from fedmeta.evaluation import NEW, TRAINING, VALIDATION
from fedmeta.experiment import Experiment
from fedmeta.messages import (
    FAILURES,
    QUERY_CATEGORIES,
    QUERY_SUMS,
    CategoriesReply,
    CategoriesRequest,
    MessageError,
    SitesReply,
    SumsReply,
    SumsRequest,
    failure,
)
from fedmeta.targets import TARGET_MEAN, TARGET_SCALE
from server import schema

NO_NODE = 0
"""In the place of a node's id, where a site's node is not there; Flower gives no node this one."""

SITE_UNAVAILABLE = "it was not there, or refused, when the run was resumed"
"""Why a site without a node does not answer."""

FEWEST_TO_COMPARE = 3
"""From how many nodes on their sums are compared: of two, nothing shows which one is usual."""

OUTLIER = 1e3
"""How many times as large as is usual a node's feature may be (root mean square)."""

FAR = 5.0
"""A site's mean is far off from this many standard deviations within sites, or between their means."""

FEWEST_VALUES = 5
"""Of fewer values no mean is compared."""

MOST_FAR = 20
"""How many such notes a run has."""

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

    def by_node(self, sites: NDArray[np.int64]) -> dict[int, tuple[str, ...]]:
        """Returns the names of some sites (indices, ascending) by the node that hosts them."""
        shares: dict[int, list[str]] = {}
        for site, home in zip(sites.tolist(), self.node_ids[sites].tolist(), strict=True):
            shares.setdefault(home, []).append(self.names[site])
        return {node: tuple(names) for node, names in shares.items()}


def ask(
    grid: Grid, contents: Mapping[int, RecordDict], message_type: str, timeout: float
) -> dict[int, RecordDict | str]:
    """Sends a message to each node; returns each node's reply, or why there is none."""
    messages = [grid.create_message(content, message_type, node, "0") for node, content in contents.items()]
    answers: dict[int, RecordDict | str] = dict.fromkeys(contents, f"no reply within {timeout:g} s")
    for reply in grid.send_and_receive(messages, timeout=timeout):
        node = reply.metadata.src_node_id
        if reply.has_error():
            answers[node] = f"error code {reply.error.code}"
        else:
            code = failure(reply.content)
            answers[node] = f"{code}: {FAILURES[code]}" if code else reply.content
    return answers


def ask_categories(grid: Grid, federation: Federation, experiment: Experiment) -> tuple[Federation, dict[str, str]]:
    """Returns the federation with the names that the run knows of each column of categories.

    These are the names that enough train rows of some training site have (`data.category_rows`), sorted. A site whose
    reply is missing or not possible has no part in them.

    Returns:
        The federation, and the sites without a part with the reasons.

    Raises:
        FedmetaError: A column has too many names, or no feature is left.
    """
    columns = federation.categorical
    if not columns or federation.categories:
        return federation, {}
    shares = federation.by_node(federation.training)
    contents = {node: CategoriesRequest(names, columns).pack() for node, names in shares.items() if node != NO_NODE}
    answers = ask(grid, contents, QUERY_CATEGORIES, experiment.server.round_timeout)
    found: dict[str, set[str]] = {column: set() for column in columns}
    refused = dict.fromkeys(shares.get(NO_NODE, ()), SITE_UNAVAILABLE)
    for node, content in answers.items():
        names = shares[node]
        try:
            if isinstance(content, str):
                raise MessageError(content)
            reply = CategoriesReply.unpack(content).categories
            _check_categories(reply, columns, int(federation.train_rows[federation.indices(names)].sum()), experiment)
        except MessageError as error:
            refused.update(dict.fromkeys(names, f"no categories: {error}"))
            continue
        for column, own in reply:
            found[column].update(own)
    for column, every in found.items():
        if len(every) > MOST_NAMES:
            raise FedmetaError(
                f'column "{column}" has {len(every):,} categories at the sites, and may have {MOST_NAMES:,}: '
                "leave it out"
            )
    grown = replace(federation, categories=tuple((column, tuple(sorted(found[column]))) for column in columns))
    features = feature_names(grown.features, grown.categories)
    if not features:
        raise FedmetaError(
            "no feature is left: no category has data.category_rows = "
            f"{experiment.data.category_rows} train rows at a site; lower it"
        )
    if len(set(features)) < len(features):
        twice = next(name for name in features if features.count(name) > 1)
        raise FedmetaError(f'a column and a category are both called "{twice}": rename the column')
    return grown, refused


def _check_categories(reply: Categories, columns: tuple[str, ...], rows: int, experiment: Experiment) -> None:
    """Checks that a node named categories of the columns asked for, and no more than its rows can hold.

    Raises:
        MessageError: They do not fit.
    """
    if tuple(column for column, _ in reply) != columns:
        raise MessageError("it names categories of other columns than it was asked for")
    for column, names in reply:
        if len(names) * experiment.data.category_rows > rows:
            raise MessageError(f'column "{column[:80]}" has {len(names)} categories, more than its {rows} rows hold')


def ask_standardisation(
    grid: Grid, federation: Federation, experiment: Experiment, notes: list[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the meta-state's standardisation entries, from the sums of the training sites' train rows.

    Sites whose sums are missing or impossible have no part in them. With a robust aggregator the statistics are medians
    of each site's own mean and spread, which a few sites do not move far; with the mean they are those of all rows.

    Args:
        grid: Flower's grid.
        federation: The sites.
        experiment: The run's description.
        notes: Takes a sentence on each site whose feature lies far from those of the others.

    Returns:
        The entries, and the sites without a part in them with the reasons.

    Raises:
        FedmetaError: Fewer sites than `server.min_sites` sent usable sums.
    """
    if federation.form:
        # An own source's data are used as they are.
        return {"standardisation.mean": torch.zeros(1), "standardisation.scale": torch.ones(1)}, {}
    robust = experiment.server.aggregator != "mean"
    shares = federation.by_node(federation.training)
    shape = statistic_shape(federation.row_shape, experiment.data.standardise, tokens=federation.tokens)
    contents = {
        node: SumsRequest(names, robust, federation.categories).pack()
        for node, names in shares.items()
        if node != NO_NODE
    }
    answers = ask(grid, contents, QUERY_SUMS, experiment.server.round_timeout)
    parts: list[tuple[tuple[str, ...], SumsReply]] = []
    refused = dict.fromkeys(shares.get(NO_NODE, ()), SITE_UNAVAILABLE)
    for node, content in answers.items():
        names = shares[node]
        try:
            if isinstance(content, str):
                raise MessageError(content)
            reply = SumsReply.unpack(content)
            _check_sums(reply, shape, federation, names, per_site=robust)
        except MessageError as error:
            refused.update(dict.fromkeys(names, f"no feature sums: {error}"))
            continue
        parts.append((names, reply))
    parts.sort(key=lambda entry: entry[0])
    parts = parts if robust else _without_outliers(parts, refused)
    usable = sum(len(names) for names, _ in parts)
    if usable < max(1, min(experiment.server.min_sites, len(federation.training))):
        site, reason = next(iter(refused.items()))
        raise FedmetaError(f"{usable} sites sent usable feature sums; {site}: {reason}")
    if notes is not None and not robust:
        notes += far_off(parts, federation)
    replies = [reply for _, reply in parts]
    scale = standardisation(_combined(replies, "", robust=robust))
    found = {
        "standardisation.mean": torch.from_numpy(scale.mean),
        "standardisation.scale": torch.from_numpy(scale.scale),
    }
    if not federation.regression:
        if experiment.data.target in ("standardise", "log"):
            raise FedmetaError(
                f'[data] target = "{experiment.data.target}": the labels are classes, and it is for numbers; '
                "leave it out"
            )
        return found, refused
    target = target_scale(_combined(replies, "target_", robust=robust), experiment.target_kind)
    found |= {TARGET_MEAN: torch.from_numpy(target.mean), TARGET_SCALE: torch.from_numpy(target.scale)}
    return found, refused


def far_off(parts: Sequence[tuple[tuple[str, ...], SumsReply]], federation: Federation) -> list[str]:
    """Returns a sentence on each site whose feature lies far from those of the others, as where units differ.

    It needs nodes of one site each, `FEWEST_TO_COMPARE` of them, and rows that are vectors of named features.

    Args:
        parts: The sites of each node, and the sums over their train rows.
        federation: The sites.
    """
    features = feature_names(federation.features, federation.categories)
    counts = [reply.count for _, reply in parts]
    if len(parts) < FEWEST_TO_COMPARE or any(len(names) > 1 for names, _ in parts):
        return []
    if counts[0].shape != (len(features),):
        return []
    made = {f"{name}={each}" for name, names in federation.categories for each in names}
    seen = np.maximum(np.stack(counts), 1.0)
    means = np.stack([reply.total for _, reply in parts]) / seen
    spreads = np.sqrt(np.maximum(np.stack([reply.square for _, reply in parts]) / seen - means**2, 0.0))
    found = []
    for number, (names, reply) in enumerate(parts):
        others = np.arange(len(parts)) != number
        middle = np.median(means[others], axis=0)
        between = 1.4826 * np.median(np.abs(means[others] - middle), axis=0)
        usual = np.maximum(np.median(spreads[others], axis=0), between)
        far = (np.abs(means[number] - middle) > FAR * usual) & (usual > 0) & (reply.count >= FEWEST_VALUES)
        found += [
            f'{names[0]}: column "{features[place]}" has mean {means[number, place]:.4g}, the others about '
            f"{middle[place]:.4g}: other units, or a decimal or thousands separator?"
            for place in np.flatnonzero(far).tolist()
            if features[place] not in made
        ]
    return found[:MOST_FAR]


def _combined(replies: Sequence[SumsReply], prefix: str, *, robust: bool) -> FeatureSums:
    """Returns sums that mean and scale are made of: the total over all rows, or by medians over sites."""
    names = [f"{prefix}{key}" for key in ("count", "total", "square")]
    if robust:
        return median_sums(
            FeatureSums(*(np.concatenate([getattr(reply, name) for reply in replies]) for name in names))
        )
    return reduce(FeatureSums.__add__, [FeatureSums(*(getattr(reply, name) for name in names)) for reply in replies])


def _check_sums(
    reply: SumsReply, shape: tuple[int, ...], federation: Federation, names: tuple[str, ...], *, per_site: bool
) -> None:
    """Checks that sums have the shape of the run's, and that no more values were counted than the rows have.

    Args:
        reply: The sums.
        shape: The shape of one site's sums of features.
        federation: The sites, with their train rows as they announced them.
        names: The sites asked.
        per_site: Whether each site's own sums were asked for.

    Raises:
        MessageError: They do not fit.
    """
    rows = federation.train_rows[federation.indices(names)]
    sites = (len(rows),) if per_site else ()
    targets = (len(federation.targets),)
    values = np.prod(federation.row_shape, dtype=np.float64) / np.prod(shape, dtype=np.float64)
    for what, count, own, each in (
        ("features", reply.count, shape, values),
        ("targets", reply.target_count, targets, 1.0),
    ):
        if count.shape != (*sites, *own):
            raise MessageError(f"the sums of {what} have shape {count.shape} and not {(*sites, *own)}")
        most = rows.reshape(-1, *[1] * len(own)) if per_site else rows.sum()
        if (count > most * each).any():
            raise MessageError(f"more values of {what} were counted than its rows have")


def _without_outliers(
    parts: list[tuple[tuple[str, ...], SumsReply]], refused: dict[str, str]
) -> list[tuple[tuple[str, ...], SumsReply]]:
    """Returns the parts without those whose values are `OUTLIER` times as large as is usual; names these in `refused`.

    What is usual is the median over parts of the root mean square of a feature, where most of them have one above 0.
    """
    if len(parts) < FEWEST_TO_COMPARE:
        return parts
    for what in ("", "target_"):
        sizes = [
            np.sqrt(getattr(reply, f"{what}square") / np.maximum(getattr(reply, f"{what}count"), 1.0))
            for _, reply in parts
        ]
        usual = np.median(np.stack(sizes), axis=0)
        for (names, _), size in zip(parts, sizes, strict=True):
            if ((usual > 0) & (size > OUTLIER * usual)).any():
                why = f"a {'target' if what else 'feature'} is more than {OUTLIER:g} times as large as elsewhere"
                refused.update(dict.fromkeys(names, why))
    return [part for part in parts if not set(part[0]) & refused.keys()]


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
    choosing = experiment.evaluation.schedule == "auto" and len(federation.training) > 1
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
