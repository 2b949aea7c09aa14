"""A task source: who the sites are, and what each adapts on and is scored by in a round."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from hashlib import blake2b
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from fedmeta.errors import FedmetaError
from fedmeta.task import Task

PURPOSES = ("train", "validate", "test")


class TaskSource(ABC):
    """Who knows what. Subclass it; only `sites` and `task` are required.

    Attributes:
        held_out: False where support and query are the same by nature; then it is printed beside every result.
    """

    held_out: ClassVar[bool] = True

    @abstractmethod
    def sites(self) -> Sequence[str]:
        """Returns the sites' names."""

    @abstractmethod
    def task(self, site: str, purpose: str, round: int, seed: int) -> Task:  # noqa: A002
        """Returns one task of a site: two disjoint draws of its data, trees of tensors of one form at all sites.

        Args:
            site: The site's name.
            purpose: "train" in rounds 1, 2, ...; "validate" and "test" in round 0, whose query only scores.
            round: The round.
            seed: The run's seed.
        """

    def weight(self, site: str) -> float:
        """Returns the site's weight in the mean with server.weighting = "examples"; fixed when it joins."""
        return 1.0


def form_of(task: Task) -> str:
    """Returns a digest of a task's form: structure, shapes and types of its trees, 16 characters.

    Raises:
        FedmetaError: A leaf is not a tensor.
    """
    leaves, structure = tree_flatten((task.support, task.query))
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise FedmetaError(f"a task holds {type(leaf).__name__}; support and query must be trees of torch tensors")
    shapes = [(tuple(leaf.shape), str(leaf.dtype)) for leaf in leaves]
    return blake2b(repr((str(structure), shapes)).encode(), digest_size=8).hexdigest()


def as_dtype(task: Task, dtype: torch.dtype) -> Task:
    """Returns a task whose floating-point tensors have this type; complex ones the matching complex type."""
    paired = torch.complex128 if dtype == torch.float64 else torch.complex64

    def cast(leaf: Tensor) -> Tensor:
        return leaf.to(dtype) if leaf.is_floating_point() else leaf.to(paired) if leaf.is_complex() else leaf

    return Task(*(tree_map(cast, part) for part in (task.support, task.query)))
