"""What training sites send before the first round: names of categories, and sums that features are standardized by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import TypeVar

import numpy as np
import torch
from flwr.app import RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedmeta.data import FeatureSums, standardisation, target_scale
from fedmeta.data.columns import MOST_NAMES, Categories, feature_names
from fedmeta.data.sums import median_sums, statistic_shape
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.messages import (
    FAILURES,
    MASKED_SUMS,
    QUERY_CATEGORIES,
    QUERY_SUMS,
    CategoriesReply,
    CategoriesRequest,
    MessageError,
    SumsReply,
    SumsRequest,
    failure,
)
from fedmeta.messages.registration import SUMS
from fedmeta.secure.ring import decode_wide
from fedmeta.targets import TARGET_MEAN, TARGET_SCALE
from server.federation import NO_NODE, SITE_UNAVAILABLE, Federation

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


Reply = TypeVar("Reply")


def _ask_training(
    grid: Grid,
    federation: Federation,
    experiment: Experiment,
    message_type: str,
    request: Callable[[tuple[str, ...]], RecordDict],
    read: Callable[[RecordDict, tuple[str, ...]], Reply],
    what: str,
) -> tuple[list[tuple[tuple[str, ...], Reply]], dict[str, str]]:
    """Asks the nodes of the training sites; a site whose reply is missing or not possible has no part.

    Args:
        grid: Flower's grid.
        federation: The sites.
        experiment: The run's description.
        message_type: The type of the messages.
        request: Returns the content for a node's sites.
        read: Returns what a reply holds for a node's sites; raises `MessageError` where that cannot be.
        what: What is asked for, for reasons.

    Returns:
        The sites of each node with what it sent, and the sites without a part with the reasons.
    """
    shares = federation.by_node(federation.training)
    contents = {node: request(names) for node, names in shares.items() if node != NO_NODE}
    parts: list[tuple[tuple[str, ...], Reply]] = []
    refused = dict.fromkeys(shares.get(NO_NODE, ()), SITE_UNAVAILABLE)
    for node, content in ask(grid, contents, message_type, experiment.server.round_timeout).items():
        names = shares[node]
        try:
            if isinstance(content, str):
                raise MessageError(content)
            parts.append((names, read(content, names)))
        except MessageError as error:
            refused.update(dict.fromkeys(names, f"no {what}: {error}"))
    return parts, refused


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

    def read(content: RecordDict, names: tuple[str, ...]) -> Categories:
        reply = CategoriesReply.unpack(content).categories
        _check_categories(reply, columns, int(federation.train_rows[federation.indices(names)].sum()), experiment)
        return reply

    parts, refused = _ask_training(
        grid,
        federation,
        experiment,
        QUERY_CATEGORIES,
        lambda names: CategoriesRequest(names, columns).pack(),
        read,
        "categories",
    )
    found: dict[str, set[str]] = {column: set() for column in columns}
    for _, reply in parts:
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
    if experiment.privacy.secure_aggregation:
        sums, refused = secure_feature_sums(grid, federation, experiment)
        return _entries([sums], federation, experiment, robust=False), refused
    robust = experiment.server.aggregator != "mean"
    shape = statistic_shape(federation.row_shape, experiment.data.standardise, tokens=federation.tokens)

    def read(content: RecordDict, names: tuple[str, ...]) -> SumsReply:
        reply = SumsReply.unpack(content)
        _check_sums(reply, shape, federation, names, per_site=robust)
        return reply

    parts, refused = _ask_training(
        grid,
        federation,
        experiment,
        QUERY_SUMS,
        lambda names: SumsRequest(names, robust, federation.categories).pack(),
        read,
        "feature sums",
    )
    parts.sort(key=lambda entry: entry[0])
    parts = parts if robust else _without_outliers(parts, refused)
    usable = sum(len(names) for names, _ in parts)
    if usable < max(1, min(experiment.server.min_sites, len(federation.training))):
        site, reason = next(iter(refused.items()))
        raise FedmetaError(f"{usable} sites sent usable feature sums; {site}: {reason}")
    if notes is not None and not robust:
        notes += far_off(parts, federation)
    return _entries([reply for _, reply in parts], federation, experiment, robust=robust), refused


def _entries(
    replies: Sequence[SumsReply], federation: Federation, experiment: Experiment, *, robust: bool
) -> dict[str, Tensor]:
    """Returns the meta-state's standardisation entries of sums."""
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
        return found
    target = target_scale(_combined(replies, "target_", robust=robust), experiment.target_kind)
    found |= {TARGET_MEAN: torch.from_numpy(target.mean), TARGET_SCALE: torch.from_numpy(target.scale)}
    return found


def secure_feature_sums(grid: Grid, federation: Federation, experiment: Experiment) -> tuple[SumsReply, dict[str, str]]:
    """Returns the sums over all training sites, of which the server learns nothing else, and the sites without a part.

    Raises:
        FedmetaError: Too few sites were left, or the sums cannot be.
    """
    from server.secure_sum import secure_sum  # asks as this file does

    shape = statistic_shape(federation.row_shape, experiment.data.standardise, tokens=federation.tokens)
    targets = (len(federation.targets),)
    shapes = {key: targets if key.startswith("target_") else shape for key in SUMS}
    sizes = [int(np.prod(own, dtype=np.int64)) for own in shapes.values()]
    found = secure_sum(
        grid,
        federation.by_node(federation.training),
        experiment,
        f"sums {experiment.identity()}",
        MASKED_SUMS,
        lambda names: SumsRequest(names, per_site=False, categories=federation.categories).pack(),
        2 * sum(sizes),
    )
    if found.total is None:
        site, reason = next(iter(found.failed.items()), ("", ""))
        raise FedmetaError("; ".join([found.why, *([f"{site}: {reason}"] if site else [])]))
    parts = np.split(decode_wide(found.total, experiment.privacy.quantum), np.cumsum(sizes)[:-1])
    own = {key: part.reshape(shapes[key]) for key, part in zip(SUMS, parts, strict=True)}
    # Counts are whole; what squares fall short of for rounding to the quantum is none.
    for what in ("", "target_"):
        own[f"{what}count"] = np.rint(own[f"{what}count"])
        least = own[f"{what}total"] ** 2 / np.maximum(own[f"{what}count"], 1.0)
        own[f"{what}square"] = np.maximum(own[f"{what}square"], least)
    try:
        return SumsReply.unpack(SumsReply(**own).pack()), found.failed
    except MessageError as error:
        raise FedmetaError(f"the secure sums of features are not possible: {error}") from None


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
