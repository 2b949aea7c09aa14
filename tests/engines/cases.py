"""Models, batches of tasks and comparisons for the tests of the engines."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedmeta.engines import loop
from fedmeta.engines.selection import ENGINES
from fedmeta.engines.weighted_sum import WeightedSum
from fedmeta.learners import Learner
from fedmeta.task import Batch, Task, stack

VOCABULARY, LENGTH, CLASSES = 11, 7, 5


class Attention(nn.Module):
    """Self-attention from linear layers and matrix products."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        query, key, value = (
            layer(x).view(n, length, self.heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        weights = (query @ key.transpose(-1, -2) / (width // self.heads) ** 0.5).softmax(-1)
        return self.out((weights @ value).transpose(1, 2).reshape(n, length, width))


class FusedAttention(Attention):
    """The same by torch's own function."""

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        parts = (
            layer(x).view(n, length, self.heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(*parts)
        return self.out(mixed.transpose(1, 2).reshape(n, length, width))


class Transformer(nn.Module):
    """One transformer block on token numbers, with positions as a parameter, an embedding, or none."""

    def __init__(self, positions: str = "parameter", attention: type[Attention] = Attention, width: int = 8) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.parameter = nn.Parameter(torch.randn(1, LENGTH, width)) if positions == "parameter" else None
        self.embedding = nn.Embedding(LENGTH, width) if positions == "embedding" else None
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = attention(width, 2)
        self.dense = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x)
        if self.parameter is not None:
            h = h + self.parameter
        if self.embedding is not None:
            h = h + self.embedding(torch.arange(x.shape[1]))
        h = h + self.attention(self.norms[0](h))
        h = h + self.dense(self.norms[1](h))
        return self.head(h.mean(1))


def tasks(
    sizes: list[tuple[int, int]],
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    tokens: bool = False,
    regression: bool = False,
) -> Batch:
    """Returns tasks of these (support, query) sizes as a padded batch."""
    generator = torch.Generator().manual_seed(seed)

    def rows(n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(n, *shape, generator=generator, dtype=dtype)
        if tokens:
            x = torch.randint(0, VOCABULARY, (n, LENGTH), generator=generator)
        labels = torch.randint(0, CLASSES, (n,), generator=generator)
        return x, labels.to(dtype) / CLASSES if regression else labels

    return stack([Task(rows(support), rows(query)) for support, query in sizes])


def state(learner: Learner, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Returns a meta-state of this type."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in learner.init(1).items()}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Returns |one - other| / |other|, over all entries together."""
    difference = torch.cat([(one[name].double() - other[name].double()).flatten() for name in other])
    size = torch.cat([value.double().flatten() for value in other.values()]).norm()
    return float(difference.norm() / size.clamp(min=1e-30))


def disagreement(learner: Learner, engine: str, batch: Batch, dtype: torch.dtype = torch.float64) -> float:
    """Returns how far an engine is from the reference loop in float64, over gradient, figures, scores and losses."""
    exact = batch if dtype == torch.float64 else _double(batch)
    own = state(learner, dtype)
    reference = {name: value.double() for name, value in own.items()}
    weights = torch.linspace(0.5, 2.0, batch.sites, dtype=torch.float64)
    expected = loop.meta_gradients(learner, reference, exact, weights)
    actual = ENGINES[engine].meta_gradients(learner, own, batch, weights)
    assert actual.weight == expected.weight
    steps = learner.evaluation_steps()
    found = ENGINES[engine].evaluate(learner, own, batch, steps)
    true = loop.evaluate(learner, reference, exact, steps)
    assert found.keys() == true.keys()
    if dtype == torch.float64:  # in float32 an answer may fall on the other side of a tie, or of a bin's edge
        for name, values in true.items():
            assert torch.allclose(found[name].double(), values.double(), atol=1e-6, equal_nan=True), name
    return max(
        distance(actual.total, expected.total),
        distance(figures(actual), figures(expected)),
        distance({"": found["loss"]}, {"": true["loss"]}),
    )


def figures(contribution: WeightedSum) -> dict[str, Tensor]:
    """Returns the per-site figures as tensors [sites]."""
    return {name: torch.cat(values) for name, values in contribution.metrics.items()}


def _double(batch: Batch) -> Batch:
    return Batch(*(tuple(t.double() if t.is_floating_point() else t for t in rows) for rows in batch))
