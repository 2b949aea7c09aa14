"""The landscape of a run's meta-objective: curvature by stochastic Lanczos quadrature, and how far sites agree.

F(theta) = mean over sites of L_Q(U_i(theta)) is the loss after adapting, as a function of all that is trained. Its
Hessian H is never formed: a Hessian-vector product costs a few gradients. From a random start Lanczos' method turns H
into a small tridiagonal matrix whose eigenvalues, weighted by the squares of their eigenvectors' first entries, are
nodes and weights of a Gauss quadrature of H's spectral density (Golub and Welsch 1969; Ghorbani et al. 2019).

Flatness of F by itself does not predict how well new sites fare; the agreement of the sites' gradients and adaptation
paths does more (Guiroy, Verma and Pal 2019): both are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.utils._pytree import tree_map

from fedmeta.learners import Learner, trained
from fedmeta.learners.learner import frozen
from fedmeta.task import Task

Floats = NDArray[np.float64]
Product = Callable[[Tensor], Tensor]
"""The product of a symmetric matrix with a vector [size]."""

FLAT = 1e-4
"""Eigenvalues below this share of the largest in size count as zero."""


@dataclass(frozen=True)
class Spectrum:
    """Gauss quadrature of a spectral density: weights at nodes, over all random starts.

    Attributes:
        nodes: Ritz values.
        weights: Their weights, which add up to 1.
        largest: The largest eigenvalue that was found.
        smallest: The smallest one.
    """

    nodes: Floats
    weights: Floats
    largest: float
    smallest: float

    def density(self, places: Floats, width: float) -> Floats:
        """Returns the density at some places, each node a normal density of standard deviation `width`."""
        apart = (places[:, None] - self.nodes) / width
        found: Floats = (self.weights * np.exp(-0.5 * apart**2)).sum(1) / (width * np.sqrt(2 * np.pi))
        return found

    def below(self, value: float) -> float:
        """Returns the share of eigenvalues below a value."""
        return float(self.weights[self.nodes < value].sum())

    @property
    def tolerance(self) -> float:
        """What counts as zero."""
        return FLAT * max(abs(self.largest), abs(self.smallest))

    @property
    def negative(self) -> float:
        """The share of negative curvature."""
        return self.below(-self.tolerance)

    @property
    def flat(self) -> float:
        """The share of eigenvalues that count as zero."""
        return float(self.weights[np.abs(self.nodes) <= self.tolerance].sum())

    @property
    def condition(self) -> float:
        """The largest size of an eigenvalue over the median size of those that do not count as zero."""
        sizes = np.abs(self.nodes)
        kept = sizes > self.tolerance
        order = np.argsort(sizes[kept])
        share = np.cumsum(self.weights[kept][order])
        median = sizes[kept][order][np.searchsorted(share, share[-1] / 2)]
        return float(sizes.max() / median)


def spectrum(product: Product, size: int, steps: int, probes: int, seed: int) -> Spectrum:
    """Returns the spectral density of a symmetric matrix [size, size] by stochastic Lanczos quadrature.

    Args:
        product: Multiplies with the matrix, in float64.
        size: The number of rows.
        steps: Lanczos steps from each start; at most `size`.
        probes: Random starts.
        seed: Key of the starts.
    """
    random = torch.Generator().manual_seed(seed)
    nodes, weights = [], []
    for _ in range(probes):
        values, first = lanczos(product, torch.randn(size, generator=random, dtype=torch.float64), min(steps, size))
        nodes.append(values)
        weights.append(first**2 / probes)
    every = np.concatenate(nodes)
    return Spectrum(every, np.concatenate(weights), float(every.max()), float(every.min()))


def lanczos(product: Product, start: Tensor, steps: int) -> tuple[Floats, Floats]:
    """Returns the eigenvalues of Lanczos' tridiagonal matrix, and the first entries of its eigenvectors.

    Every new vector is made orthogonal to all earlier ones twice: the three-term recurrence alone loses that in
    floating point, and finds eigenvalues more than once.
    """
    basis = start.new_empty(steps + 1, len(start))
    basis[0] = start / start.norm()
    diagonal: list[float] = []
    beside: list[float] = []
    for step in range(steps):
        found = product(basis[step])
        diagonal.append(float(found @ basis[step]))
        earlier = basis[: step + 1]
        for _ in range(2):
            found = found - earlier.T @ (earlier @ found)
        length = float(found.norm())
        # The start lies in an invariant subspace, whose spectrum is complete.
        if length <= 1e-12 * max(1.0, abs(diagonal[-1])):
            break
        beside.append(length)
        basis[step + 1] = found / length
    values, vectors = eigh_tridiagonal(diagonal, beside[: len(diagonal) - 1])
    return values, vectors[0]


@dataclass(frozen=True)
class Landscape:
    """What was found at a run's meta-state.

    Attributes:
        spectrum: Of the meta-objective's Hessian.
        loss: The meta-objective.
        gradient_norm: The norm of its gradient.
        gradient_cosine: The mean cosine of two sites' meta-gradients.
        gradient_product: The mean inner product of two sites' meta-gradients.
        path_cosine: The mean cosine of two sites' adaptation paths, from start to end; NaN where nothing adapts.
        path_product: Their mean inner product.
        parameters: How many numbers the federation trains.
        sites: How many sites' tasks were used.
    """

    spectrum: Spectrum
    loss: float
    gradient_norm: float
    gradient_cosine: float
    gradient_product: float
    path_cosine: float
    path_product: float
    parameters: int
    sites: int

    def figures(self) -> dict[str, float]:
        """Returns what is reported, by name."""
        own = {key: float(value) for key, value in asdict(self).items() if key != "spectrum"}
        found = self.spectrum
        return {
            "largest_eigenvalue": found.largest,
            "smallest_eigenvalue": found.smallest,
            "negative_share": found.negative,
            "flat_share": found.flat,
            "condition": found.condition,
            **own,
        }


def landscape(
    learner: Learner, meta_state: Mapping[str, Tensor], tasks: Sequence[Task], steps: int, probes: int, seed: int
) -> Landscape:
    """Measures the meta-objective around a meta-state, in float64.

    Args:
        learner: The run's learner; its sites adapt by its own number of inner steps, none where it never adapts.
        meta_state: The meta-state, without standardisation.
        tasks: One task of each of some sites.
        steps: Lanczos steps from each random start.
        probes: Random starts.
        seed: Key of the starts.
    """
    state = {name: _double(value.detach()) for name, value in trained(meta_state).items()}
    fixed = {name: _double(value.detach()) for name, value in frozen(meta_state).items()}
    doubled = [Task(*(tree_map(_double, part) for part in task)) for task in tasks]
    inner = learner.evaluation_steps()
    names, sizes = list(state), [value.numel() for value in state.values()]

    def unflat(vector: Tensor) -> dict[str, Tensor]:
        parts = torch.split(vector, sizes)
        return {name: part.reshape(state[name].shape) for name, part in zip(names, parts, strict=True)}

    def loss(vector: Tensor, task: Task) -> Tensor:
        whole = {**unflat(vector), **fixed}
        return learner.outer(learner.adaptation_path(whole, task.support, inner)[-1], task.query)

    flat = torch.cat([value.reshape(-1) for value in state.values()])
    mean = _mean_of(loss, doubled, flat)
    gradients = torch.stack([grad(loss)(flat, task) for task in doubled])
    found = spectrum(lambda vector: jvp(grad(mean), (flat,), (vector,))[1], len(flat), steps, probes, seed)
    cosine, product = agreement(gradients)
    paths = torch.stack([_path(learner, {**state, **fixed}, task, inner) for task in doubled])
    path_cosine, path_product = agreement(paths)
    return Landscape(
        found,
        float(mean(flat)),
        float(gradients.mean(0).norm()),
        cosine,
        product,
        path_cosine,
        path_product,
        len(flat),
        len(tasks),
    )


def agreement(vectors: Tensor) -> tuple[float, float]:
    """Returns the mean cosine and the mean inner product of two different rows [sites, size]; NaN for one or zeros."""
    count = len(vectors)
    if count < 2 or not vectors.any():
        return float("nan"), float("nan")
    products = vectors @ vectors.T
    norms = vectors.norm(dim=1).clamp(min=torch.finfo(vectors.dtype).tiny)
    apart = ~torch.eye(count, dtype=torch.bool)
    return float((products / norms[:, None] / norms)[apart].mean()), float(products[apart].mean())


def _mean_of(loss: Callable[[Tensor, Task], Tensor], tasks: Sequence[Task], flat: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns the mean loss over tasks: all at once where they have one form and torch.vmap takes them, else a loop."""

    def looped(vector: Tensor) -> Tensor:
        return torch.stack([loss(vector, task) for task in tasks]).mean()

    def together(vector: Tensor) -> Tensor:
        found: Tensor = vmap(loss, (None, 0))(vector, stacked).mean()
        return found

    try:
        stacked = tree_map(lambda *leaves: torch.stack(leaves), *tasks)
        jvp(grad(together), (flat,), (flat,))
    except (RuntimeError, ValueError, TypeError):
        return looped
    return together


def _path(learner: Learner, state: Mapping[str, Tensor], task: Task, steps: int) -> Tensor:
    """Returns how far adapting moves a site's parameters [size]."""
    path = learner.adaptation_path(state, task.support, steps)
    moved = learner.problem.moved
    return torch.cat([(path[-1][name] - path[0][name]).detach().reshape(-1) for name in moved])


def _double(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.double() if leaf.is_floating_point() else leaf.to(torch.complex128) if leaf.is_complex() else leaf
