"""Tasks: what a site adapts on, and what scores it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from fedmeta.errors import FedmetaError

Rows = tuple[Tensor, ...]
"""(x, y) or (x, y, mask): x [n, *shape]; y [n], integer classes or float targets; mask [n], 1 = a row, 0 = padding."""


class Task(NamedTuple):
    """One (support, query) pair of one site.

    Attributes:
        support: What the site adapts on: rows `(x, y)` or `(x, y, mask)`; of an own problem a tensor or a tree of them.
        query: What scores the adapted parameters, of the same form.
    """

    support: Any
    query: Any


class OrderedTask(Task):
    """A task whose rows are taken in mini-batches, in a drawn order.

    Attributes:
        order: The places of rows, support before query, -1 for none [epochs, batches, size] (`fedmeta.minibatches`).
    """

    order: Tensor

    def __new__(cls, support: Any, query: Any, order: Tensor) -> "OrderedTask":
        """Returns the task."""
        task = super().__new__(cls, support, query)
        task.order = order
        return task


@dataclass(frozen=True, eq=False)
class Batch:
    """The tasks of many sites, padded to one length and stacked along a leading site axis.

    Iterates over support and query.

    Attributes:
        support: x [sites, n, *shape], y [sites, n], mask [sites, n].
        query: The same with its own n.
        pairs: The Gram matrix x x^T of each site's rows, support before query, [sites, N, N] with N the rows of both;
            None where it is not known beforehand.
        order: The mini-batches of each site [sites, epochs, batches, size]: the places of rows, support before query,
            -1 for none; None where rows are not taken in mini-batches.
        noise: The key of each site's noise in this round [sites], int64 (`fedmeta.noise`); None for 0 at all.
    """

    support: Rows
    query: Rows
    pairs: Tensor | None = None
    order: Tensor | None = None
    noise: Tensor | None = None

    def __iter__(self) -> Iterator[Rows]:
        """Yields the support rows and the query rows."""
        yield self.support
        yield self.query

    @property
    def sites(self) -> int:
        """The number of sites."""
        return int(self.support[0].shape[0])

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.support[0].device

    def task(self, site: int) -> Task:
        """Returns the task of one site without its padding, and without mini-batches that hold none of its rows."""
        support, query = _unpad(self.support, site), _unpad(self.query, site)
        if self.order is None:
            return Task(support, query)
        present = torch.cat([self.support[2][site], self.query[2][site]]) > 0
        places = self.order[site].clamp(min=0)
        there = (self.order[site] >= 0) & present[places]
        order = torch.where(there, (present.cumsum(0) - 1)[places], -1)
        return OrderedTask(support, query, order[:, there.any(2).any(0)])

    def to(self, device: str) -> "Batch":
        """Returns the batch on a device ("cpu" or "cuda")."""
        pairs, order = (None if each is None else each.to(device) for each in (self.pairs, self.order))
        return replace(self.map(lambda rows: tuple(tensor.to(device) for tensor in rows)), pairs=pairs, order=order)

    def with_noise(self, keys: Tensor | None) -> "Batch":
        """Returns the batch with the keys of its sites' noise [sites]."""
        return self if keys is None else replace(self, noise=keys)

    def noise_keys(self) -> Tensor:
        """Returns the keys of its sites' noise [sites]."""
        return torch.zeros(self.sites, dtype=torch.int64) if self.noise is None else self.noise

    def chunk(self, start: int, stop: int) -> "Batch":
        """Returns the sites `start` to `stop` (exclusive) as views."""
        return self.take(slice(start, stop))

    def take(self, sites: slice | Tensor) -> "Batch":
        """Returns some sites: as views of a slice, as copies for numbers."""
        pairs, order = (None if each is None else each[sites] for each in (self.pairs, self.order))
        noise = None if self.noise is None else self.noise[_on_cpu(sites)]
        taken = self.map(lambda rows: tuple(tensor[sites] for tensor in rows))
        return replace(taken, pairs=pairs, order=order, noise=noise)

    def cut(self) -> "Batch":
        """Returns the batch without columns in which no site has a row; no `pairs` are known of it."""
        first = self.support[0].shape[1]
        shorter = self.map(lambda rows: tuple(tensor[:, : max(1, int(row_ends(rows).max()))] for tensor in rows))
        if self.order is None:
            return shorter
        order = torch.where(self.order >= first, self.order - (first - shorter.support[0].shape[1]), self.order)
        there = order >= 0
        order = order[:, :, there.any(3).any(1).any(0)]
        return replace(shorter, order=order)

    def map(self, change: Callable[[Rows], Rows]) -> "Batch":
        """Returns a batch of changed support and query rows, of which no `pairs` and no `order` are known."""
        return Batch(change(self.support), change(self.query), noise=self.noise)


def task_of(support: Any, query: Any, *order: Tensor) -> Task:
    """Returns a task, with the order of its rows where there is one (`orders`)."""
    return OrderedTask(support, query, *order) if order else Task(support, query)


def orders(batch: Batch) -> tuple[Tensor, ...]:
    """Returns a batch's order as the further argument that a function of each site's tensors takes, or none."""
    return () if batch.order is None else (batch.order,)


class TreeBatch(Batch):
    """The tasks of many sites whose data are trees of tensors of one form, stacked along a leading site axis."""

    support: Any
    query: Any

    @property
    def sites(self) -> int:
        """The number of sites."""
        return len(tree_leaves(self.support)[0])

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        leaf: Tensor = tree_leaves(self.support)[0]
        return leaf.device

    def task(self, site: int) -> Task:
        """Returns the task of one site."""
        return Task(*(tree_map(lambda leaf: leaf[site], part) for part in (self.support, self.query)))

    def to(self, device: str) -> "Batch":
        """Returns the batch on a device."""
        return self.map(lambda part: tree_map(lambda leaf: leaf.to(device), part))

    def take(self, sites: slice | Tensor) -> "Batch":
        """Returns some sites: as views of a slice, as copies for numbers."""
        noise = None if self.noise is None else self.noise[_on_cpu(sites)]
        return replace(self.map(lambda part: tree_map(lambda leaf: leaf[sites], part)), noise=noise)

    def map(self, change: Callable[[Any], Any]) -> "Batch":
        """Returns a batch of changed support and query."""
        return TreeBatch(change(self.support), change(self.query), noise=self.noise)


def stack_trees(tasks: Sequence[Task]) -> TreeBatch:
    """Returns tasks whose data are trees of tensors as one batch.

    Raises:
        FedmetaError: Two sites' tasks differ in structure or shapes.
    """
    parts = []
    for place, what in enumerate(("support", "query")):
        flat = [tree_flatten(task[place]) for task in tasks]
        first, structure = flat[0]
        for number, (leaves, form) in enumerate(flat):
            if form != structure or [leaf.shape for leaf in leaves] != [leaf.shape for leaf in first]:
                raise FedmetaError(
                    f"the {what} of task {number} has another form than that of task 0: the tasks of all sites must "
                    "be trees of tensors with the same structure and shapes; pad them, and hold a mask in the tree"
                )
        parts.append(tree_map(lambda *leaves: torch.stack(leaves), *(task[place] for task in tasks)))
    return TreeBatch(*parts)


def rows_mask(rows: Rows) -> Tensor:
    """Returns the mask [n] of rows as numbers, all ones where there is none, in the dtype of x (float32 for integer x).

    A mask of floating-point numbers is returned as it is; one of truth values or whole numbers would round what it is
    multiplied by.
    """
    x = rows[0]
    dtype = x.dtype if x.is_floating_point() else torch.float32
    if len(rows) == 3:
        return rows[2] if rows[2].is_floating_point() else rows[2].to(dtype)
    return torch.ones(x.shape[0], dtype=dtype, device=x.device)


def row_ends(rows: Rows) -> Tensor:
    """Returns where each site's last row ends [sites], in rows [sites, n] with a mask."""
    mask = rows[2]
    # The common case first, which is sooner seen than counted.
    if bool((mask[:, -1:] > 0).all()):
        return torch.full(mask.shape[:1], mask.shape[1], device=mask.device)
    return ((mask > 0) * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)


def stack(tasks: Sequence[Task]) -> Batch:
    """Returns tasks of unequal sizes as one padded batch; padding rows are zero and masked out.

    A site's support and query rows lie one after the other in one array, as some engines take them best.
    """
    parts = [_stack([task.support for task in tasks]), _stack([task.query for task in tasks])]
    both = [torch.cat(pair, 1) for pair in zip(*parts, strict=True)]
    first = parts[0][0].shape[1]
    return Batch(tuple(tensor[:, :first] for tensor in both), tuple(tensor[:, first:] for tensor in both))


def _on_cpu(sites: slice | Tensor) -> slice | Tensor:
    return sites.cpu() if isinstance(sites, Tensor) else sites


def _unpad(rows: Rows, site: int) -> Rows:
    x, y, mask = (tensor[site] for tensor in rows)
    keep = mask > 0
    return (x, y) if bool(keep.all()) else (x[keep], y[keep])


def _stack(sites: Sequence[Rows]) -> Rows:
    longest = max(rows[0].shape[0] for rows in sites)
    columns = [(rows[0], rows[1], rows_mask(rows)) for rows in sites]
    return tuple(torch.stack([_pad(rows[column], longest) for rows in columns]) for column in range(3))


def _pad(tensor: Tensor, length: int) -> Tensor:
    padding = tensor.new_zeros((length - tensor.shape[0], *tensor.shape[1:]))
    return torch.cat([tensor, padding]) if len(padding) else tensor
