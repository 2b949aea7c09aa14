"""Which sites fit together: those whose rows have the form that most nodes share; the others are refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from fedmeta.messages import SitesReply

FEW_CLASSES = 16
"""So many classes may a node always name."""

CLASS_EXCESS = 10.0
"""How many times as many classes as is usual a node may name."""

FEWEST_TO_COMPARE = 3
"""From how many nodes on their numbers of classes are compared."""


class Schema(Protocol):
    """The schema of rows and labels, as a node or a federation has it."""

    @property
    def features(self) -> tuple[str, ...]:
        """Feature names, where rows have them."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one row."""

    @property
    def regression(self) -> bool:
        """Whether labels are numbers."""

    @property
    def tokens(self) -> bool:
        """Whether features are integer codes."""

    @property
    def targets(self) -> tuple[str, ...]:
        """What each target of a regression is called; empty for classes."""

    @property
    def categorical(self) -> tuple[str, ...]:
        """Which features are columns of categories."""

    @property
    def form(self) -> str:
        """A digest of the form of an own source's tasks; empty for rows."""


def select_majority_schema(
    replies: Mapping[int, SitesReply], fixed: Schema | None = None
) -> tuple[dict[int, SitesReply], dict[str, str]]:
    """Returns the replies of the form that most nodes share, and the other sites with how they differ from it.

    A node counts once: a key admits one, and a node that makes names up does not outvote the others. Of two forms
    with equally many nodes the one with more sites is taken, then the one with the first site by name, so that neither
    the order in which nodes answer nor their ids decide. Replies come in the order of their first site's name.

    Args:
        replies: What nodes host.
        fixed: The form, where it is fixed already, as in a run that is resumed.
    """
    ordered = sorted(replies.items(), key=lambda reply: reply[1].names)
    if fixed is not None:
        differences = {node: schema_mismatch(reply, fixed) for node, reply in ordered}
        return (
            {node: reply for node, reply in ordered if not differences[node]},
            {name: differences[node] for node, reply in ordered if differences[node] for name in reply.names},
        )
    counts: dict[tuple[object, ...], tuple[int, int]] = {}
    for _, reply in ordered:
        nodes, sites = counts.get(_schema_of(reply), (0, 0))
        counts[_schema_of(reply)] = (nodes + 1, sites + len(reply.names))
    if not counts:
        return {}, {}
    chosen = max(counts, key=counts.__getitem__)  # of equal counts the first one, whose site came first
    accepted = {node: reply for node, reply in ordered if _schema_of(reply) == chosen}
    example = next(iter(accepted.values()))
    refused = {
        name: schema_mismatch(reply, example) for node, reply in ordered if node not in accepted for name in reply.names
    }
    return accepted, refused


def excess_classes(replies: Mapping[int, SitesReply]) -> dict[int, str]:
    """Returns the nodes that name more classes than can be, with the reason.

    Classes are the run's outputs, so that one site's invented ones would cost every site. A node names no more classes
    than it has rows, and of three nodes or more no more than `CLASS_EXCESS` times as many as is usual; `FEW_CLASSES`
    are always allowed. Of symbols all are named, whichever occur.

    Args:
        replies: What nodes host, of one schema.
    """
    counts = [len(reply.classes) for reply in replies.values()]
    usual = CLASS_EXCESS * float(np.median(counts)) if len(counts) >= FEWEST_TO_COMPARE else np.inf
    found = {}
    for node, reply in replies.items():
        rows = sum(reply.train_rows) + sum(reply.test_rows)
        most = max(FEW_CLASSES, min(usual, np.inf if reply.tokens else rows))
        if len(reply.classes) > most:
            found[node] = f"it names {len(reply.classes)} classes, and may name {most:.0f}"
    return found


def usual_categorical(replies: Mapping[int, SitesReply]) -> tuple[str, ...]:
    """Returns the columns that are categories at half of the nodes or more, in the order of the features."""
    counts: dict[str, int] = {}
    for reply in replies.values():
        for name in reply.categorical:
            counts[name] = counts.get(name, 0) + 1
    first = next(iter(replies.values()), None)
    return tuple(name for name in (first.features if first else ()) if 2 * counts.get(name, 0) >= len(replies))


def text_where_numbers(replies: Mapping[int, SitesReply]) -> dict[int, str]:
    """Returns the nodes with a column of categories that is numbers at most of the others, with the reason."""
    usual = set(usual_categorical(replies))
    found = {node: [name for name in reply.categorical if name not in usual] for node, reply in replies.items()}
    return {node: _text_column(names) for node, names in found.items() if names}


def _text_column(names: Sequence[str]) -> str:
    return f"its column {', '.join(names[:5])} holds categories, and numbers at most sites"


def schema_mismatch(reply: Schema, federation: Schema) -> str:
    """Describes how a node's schema differs from the federation's, or the empty string."""
    if reply.regression != federation.regression:
        kinds = ("classes", "numbers")
        return f"its labels are {kinds[reply.regression]}, the federation's {kinds[federation.regression]}"
    if reply.targets != federation.targets:
        found, wanted = (", ".join(names[:5]) or "none" for names in (reply.targets, federation.targets))
        return f"its targets are {found}, the federation's {wanted}"
    if set(reply.features) != set(federation.features):
        extra = sorted(set(reply.features) - set(federation.features))
        lacking = sorted(set(federation.features) - set(reply.features))
        parts = [f"columns too many: {', '.join(extra[:5])}"] * bool(extra)
        return "; ".join(parts + [f"columns missing: {', '.join(lacking[:5])}"] * bool(lacking))
    if reply.features != federation.features:
        return "its columns are in another order"
    if reply.shape != federation.shape:
        return f"its rows have shape {reply.shape}, the federation's {federation.shape}"
    if reply.form != federation.form:
        return "its tasks have another structure, other shapes or other types than the federation's"
    if reply.tokens != federation.tokens:
        return "its features are codes where the federation's are numbers, or the other way round"
    if text := [name for name in reply.categorical if name not in federation.categorical]:
        return _text_column(text)
    return ""


def _schema_of(reply: SitesReply) -> tuple[object, ...]:
    return (reply.features, reply.shape, reply.regression, reply.targets, reply.tokens, reply.form)
