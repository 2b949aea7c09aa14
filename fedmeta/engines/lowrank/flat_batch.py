"""The rows of a cohort as one long batch, and losses and scores per site."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.func import vmap

from fedmeta.problems.rows import row_errors, row_losses
from fedmeta.problems.supervised import Supervised
from fedmeta.task import Batch, Rows


@dataclass
class FlatBatch:
    """The rows of all sites, one after the other.

    Attributes:
        x: [sites * n, *shape].
        y: [sites * n] or [sites * n, targets].
        scored: Each row's share of its site's score [sites, n]: 1 / rows, and 0 for padding.
        counted: Each row's share of its site's loss, where rows of unseen classes have none either.
        kept: What does not change between inner steps, by the place of the call that computes it.
        beside: Other rows of the same sites that will be computed too: a shared weight may serve both at once.
        tasks: Where these are support rows and the query rows are `beside` them: both, by site.
        pairs: x x^T of each site's rows [sites, n, n], or of both its rows where others are `beside` these; None where
            that is not known beforehand.
        whole: Where these are a mini-batch of a site's rows: all of them.
        places: Their places in `whole`, with the rows of all sites one after the other [sites * n].
        slots: The same, were each site's rows followed by one more, which stands for those that are not there.
    """

    x: Tensor
    y: Tensor
    scored: Tensor
    counted: Tensor
    kept: dict[object, Tensor] = field(default_factory=dict)
    beside: FlatBatch | None = None
    tasks: Batch | None = None
    pairs: Tensor | None = None
    whole: FlatBatch | None = None
    places: Tensor | None = None
    slots: Tensor | None = None

    @classmethod
    def of(cls, rows: Rows, dtype: torch.dtype, pairs: Tensor | None = None) -> FlatBatch:
        """Returns x [sites, n, *shape], y [sites, n] and mask [sites, n] as one batch, x in the model's own type."""
        x, y, mask = rows
        if x.is_floating_point():
            x = x.to(dtype)
        mask = mask.to(dtype)
        known = mask if y.is_floating_point() else mask * (y >= 0)
        # Of rows in another type they are less exact than what is computed.
        pairs = pairs if pairs is not None and pairs.dtype == dtype else None
        return cls(x.flatten(0, 1), y.flatten(0, 1), _shares(mask), _shares(known), pairs=pairs)

    @classmethod
    def both(cls, batch: Batch, dtype: torch.dtype) -> tuple[FlatBatch, FlatBatch]:
        """Returns the support rows, which know of the query rows beside them, and the query rows."""
        support, query = cls.of(batch.support, dtype, batch.pairs), cls.of(batch.query, dtype)
        support.beside, support.tasks = query, batch
        return support, query

    @property
    def sites(self) -> int:
        """The number of sites."""
        return self.scored.shape[0]

    def minibatches(self, order: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Returns of each step of an order of places [sites, steps, k], -1 for none, what `at` takes."""
        sites, n = self.scored.shape
        first = torch.arange(sites, device=order.device)[:, None, None]
        here, own = (order >= 0).to(self.counted.dtype), order.clamp(min=0)
        known = (self.counted > 0).to(self.counted.dtype).gather(1, own.flatten(1)).view_as(here) * here
        counted = (known / known.sum(2, keepdim=True).clamp(min=1)).transpose(0, 1).contiguous()
        places = (own + n * first).transpose(0, 1).flatten(1)
        slots = (torch.where(order >= 0, order, n) + (n + 1) * first).transpose(0, 1).flatten(1)
        return list(zip(places, slots, counted, strict=True))

    def at(self, places: Tensor, slots: Tensor, counted: Tensor) -> FlatBatch:
        """Returns a mini-batch of each site's rows.

        Args:
            places: As for `FlatBatch` [sites * k].
            slots: Likewise.
            counted: Each row's share of its site's loss [sites, k].
        """
        x, y = self.x.index_select(0, places), self.y.index_select(0, places)
        return FlatBatch(x, y, counted, counted, whole=self, places=places, slots=slots)

    def slots_for(self, width: int) -> Tensor:
        """Returns zeros for each row, and for one more of each site, that of none [sites * (n + 1), width]."""
        sites, n = self.scored.shape
        return self.counted.new_zeros(sites * (n + 1), width)

    def of_whole(self, key: object) -> Tensor:
        """Returns these rows' part of what is kept of all rows [sites, n * calls, *]."""
        assert self.whole is not None
        assert self.places is not None
        kept, (sites, n) = self.whole.kept[key], self.whole.scored.shape
        rows = kept.reshape(sites * n, -1).index_select(0, self.places)
        return rows.view(sites, -1, kept.shape[-1])

    def kept_of_last(self, rows: int) -> dict[object, Tensor]:
        """Returns the products of linear layers that are kept [sites, n * calls, *], of each site's last rows alone."""
        n = self.scored.shape[1]
        products = {place: value for place, value in self.kept.items() if isinstance(place, tuple)}
        return {place: value[:, value.shape[1] // n * (n - rows) :] for place, value in products.items()}

    def losses(self, outputs: Tensor) -> Tensor:
        """Returns each site's mean loss [sites] over its rows of known classes."""
        return self._means(row_losses(outputs, self.y), self.counted)

    def errors(self, outputs: Tensor, factor: Tensor | float = 1.0) -> Tensor:
        """Returns `factor` times the derivative of a row's site's loss by the row's outputs [sites * n, outputs]."""
        return row_errors(outputs, self.y) * (self.counted * factor).reshape(-1, *[1] * (outputs.dim() - 1))

    def figures(self, outputs: Tensor, problem: Supervised) -> dict[str, Tensor]:
        """Returns each site's "loss" and metrics [sites], and the outputs [sites, n, outputs] where they are asked."""
        present, y = self._present(), self.y.view(*self.scored.shape, *self.y.shape[1:])
        found = {"loss": self.losses(outputs)}
        each = outputs.view(*self.scored.shape, *outputs.shape[1:])
        if "accuracy" in {metric.name for metric in problem.metrics_for(self.y)}:
            # Counted before they are divided: a sum of shares of rows would depend on which rows are right.
            right = (outputs.argmax(-1) == self.y).view_as(present) * present
            found["accuracy"] = right.sum(1) / present.sum(1).clamp(min=1)
        rest = vmap(partial(problem.figures, known=found))(each, y, present)
        return {**rest, **found}

    def _present(self) -> Tensor:
        return (self.scored > 0).to(self.scored.dtype)

    def _means(self, values: Tensor, shares: Tensor) -> Tensor:
        return (values.view_as(shares) * shares).sum(1)


def concatenate(one: Rows, other: Rows) -> Rows:
    """Returns two (x, y, mask) of the same sites as one, along their rows; without a copy where they are `adjacent`."""
    pairs = list(zip(one, other, strict=True))
    if not adjacent(one, other):
        return tuple(torch.cat(pair, 1) for pair in pairs)
    return tuple(
        first.as_strided((len(first), first.shape[1] + second.shape[1], *first.shape[2:]), first.stride())
        for first, second in pairs
    )


def adjacent(one: Rows, other: Rows) -> bool:
    """Whether each site's rows of the one lie in memory in front of its rows of the other, in the same arrays."""
    return all(
        first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and first.stride() == second.stride()
        and first.shape[2:] == second.shape[2:]
        and first.storage_offset() + first.shape[1] * first.stride(1) == second.storage_offset()
        for first, second in zip(one, other, strict=True)
    )


def _shares(mask: Tensor) -> Tensor:
    return mask / mask.sum(1, keepdim=True).clamp(min=1)
