"""Bridges of least compliance under private loads, at three levels: sizing, shape, topology (Bendsoe and Sigmund 2003).

A bridge of given volume should yield as little as it can: compliance c = f . u, with u = K^-1 f the displacements under
its loads f. A site is a bridge with its own loads, which stay private.

- `Topology`: where material is, the SIMP method (Andreassen et al. 2011, the 88 lines): densities x of square elements,
  stiffness x^3, sensitivities filtered over a radius, optimality criteria as solver. The start is shared.
- `Sizing`: how thick the bars of a Warren truss are. It is statically determinate, so that bar forces N do not depend
  on areas, and the optimum is known: areas in proportion to |N|.
- `Shape`: where the truss's upper nodes lie, its bars of optimal thickness; gradient descent.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import splu
from torch import Tensor

import fedmeta
from fedmeta.problems import OptimalityCriteria
from fedmeta.problems.problem import Parameters

LOWEST, PENALTY, POISSON, SOFTEST = 1e-3, 3.0, 0.3, 1e-9
"""Least density, exponent of stiffness, Poisson's ratio, stiffness of an element without material."""


def element() -> NDArray[np.float64]:
    """Returns the stiffness [8, 8] of a square element in plane stress, Young's modulus 1 (Sigmund 2001)."""
    v = POISSON
    k = (1/2 - v/6, 1/8 + v/8, -1/4 - v/12, -1/8 + 3*v/8, -1/4 + v/12, -1/8 - v/8, v/6, 1/8 - 3*v/8)  # fmt: skip
    order = ("01234567", "10765432", "27056341", "36507214", "45670123", "54321076", "63412705", "72143650")
    return np.array([[k[int(place)] for place in row] for row in order]) / (1 - v**2)


class Grid:
    """Square elements, columns from left to right and down in each; degrees of freedom x, y (down) per node.

    The filter's radius is in elements; `fixed` degrees of freedom do not move.
    """

    def __init__(self, wide: int, high: int, radius: float, fixed: list[int]) -> None:
        self.wide, self.high, self.freedoms = wide, high, 2 * (wide + 1) * (high + 1)
        self.free = np.setdiff1d(np.arange(self.freedoms), fixed)
        x, y = (axis.ravel() for axis in np.meshgrid(np.arange(wide), np.arange(high), indexing="ij"))
        left, right = 2 * ((high + 1) * x + y), 2 * ((high + 1) * (x + 1) + y)
        corners = [left + 2, left + 3, right + 2, right + 3, right, right + 1, left, left + 1]
        self.edges = torch.tensor(np.stack(corners, 1))
        near = np.maximum(0, radius - np.hypot(x[:, None] - x, y[:, None] - y))
        self.filter = torch.tensor(near / near.sum(1, keepdims=True))
        self.element = torch.tensor(element())

    def freedom(self, x: int, y: int) -> int:
        """Returns the first degree of freedom of the node in column x and row y from the top."""
        return 2 * (x * (self.high + 1) + y)

    def factors(self, stiffness: NDArray[np.float64]) -> Any:
        """Returns the sparse LU factors of the free part of K for elements' stiffness."""
        edges = self.edges.numpy()
        values = (self.element.numpy().ravel() * stiffness[:, None]).ravel()
        places = np.repeat(edges, 8, axis=1).ravel(), np.tile(edges, (1, 8)).ravel()
        whole = scipy.sparse.csc_matrix((values, places), shape=(self.freedoms, self.freedoms))
        return splu(whole[self.free][:, self.free].tocsc())


class Displacements(torch.autograd.Function):
    """u = K(stiffness)^-1 force; its derivative is a solve with the same factors, and is differentiable itself."""

    @staticmethod
    def forward(stiffness: Tensor, force: Tensor, grid: Grid, factors: list[Any]) -> Tensor:
        if not factors:
            factors.append(grid.factors(stiffness.detach().double().numpy()))
        found = torch.zeros_like(force)
        found[grid.free] = torch.from_numpy(factors[0].solve(force.detach().double().numpy()[grid.free])).to(force)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.grid, ctx.factors = inputs[2:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        stiffness, u = ctx.saved_tensors
        adjoint = Displacements.apply(stiffness, gradient, ctx.grid, ctx.factors)
        edges, matrix = ctx.grid.edges, ctx.grid.element
        return -((adjoint[edges] @ matrix) * u[edges]).sum(1), adjoint, None, None


def project(values: Tensor, mean: float, lowest: float) -> Tensor:
    """Returns the nearest values between `lowest` and 1 of this mean: a shift, and a clip; differentiable."""
    rough = values.detach()
    low, high = lowest - rough.max(), 1 - rough.min()
    for _ in range(60):
        middle = (low + high) / 2
        beyond = (rough + middle).clamp(lowest, 1).mean() > mean
        low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
    shift = (low + high) / 2
    free = ((rough + shift > lowest) & (rough + shift < 1)).to(values)
    moved = ((values - rough) * free).sum() / free.sum().clamp(min=1)
    return (values + shift - moved).clamp(lowest, 1)


class Bridges(fedmeta.TaskSource):
    """Who holds which loads; support and query are the same, for a bridge has one set of loads."""

    held_out: ClassVar[bool] = False
    bridges: int
    load: Any

    def sites(self) -> list[str]:
        """Returns the bridges' names."""
        return [f"bridge-{number:02d}" for number in range(self.bridges)]

    def task(self, site: str, purpose: str, round: int, seed: int) -> fedmeta.Task:
        """Returns a bridge's loads, twice."""
        force = self.load(np.random.default_rng(int(site.rpartition("-")[2])))
        return fedmeta.Task({"force": force}, {"force": force})


class Topology(Bridges, fedmeta.Problem):
    """Densities of elements, wide x high, by SIMP; the volume is the share of the area that is material."""

    metrics = (fedmeta.Metric("log_compliance", higher_is_better=False),)
    solver = OptimalityCriteria(lowest=LOWEST)

    def __init__(
        self, bridges: int = 40, wide: int = 36, high: int = 18, volume: float = 0.35, radius: float = 1.8
    ) -> None:
        self.bridges, self.volume = bridges, volume
        corners = [2 * high, 2 * high + 1, 2 * (wide * (high + 1) + high), 2 * (wide * (high + 1) + high) + 1]
        self.grid = Grid(wide, high, radius, corners)

    def init(self, seed: int) -> Parameters:
        """Returns the same density everywhere."""
        return {"density": torch.full((self.grid.wide * self.grid.high,), self.volume, dtype=torch.float64)}

    def constrain(self, parameters: Parameters) -> Parameters:
        """Returns densities of the given volume."""
        return {"density": project(parameters["density"], self.volume, LOWEST)}

    def displacements(self, parameters: Parameters, data: Any) -> Tensor:
        """Returns u, the displacements of all degrees of freedom."""
        stiffness = SOFTEST + parameters["density"] ** PENALTY * (1 - SOFTEST)
        found: Tensor = Displacements.apply(stiffness, data["force"], self.grid, [])
        return found

    def inner(self, parameters: Parameters, data: Any) -> Tensor:
        """Returns compliance."""
        return data["force"] @ self.displacements(parameters, data)

    def outer(self, parameters: Parameters, data: Any) -> Tensor:
        """Returns log compliance, in which bridges with small loads count as much as others."""
        return self.inner(parameters, data).log()

    def sensitivity(self, parameters: Parameters, data: Any) -> Parameters:
        """Returns the filtered sensitivity (Sigmund 1997): what the solver steps by, and no gradient."""
        x, grid = parameters["density"], self.grid
        u = self.displacements(parameters, data)[grid.edges]
        plain = -PENALTY * x ** (PENALTY - 1) * (1 - SOFTEST) * ((u @ grid.element) * u).sum(1)
        return {"density": grid.filter @ (x * plain) / x.clamp(min=1e-3)}

    def load(self, random: np.random.Generator) -> Tensor:
        """Returns one to three loads on the deck (top) or at half height, mostly downwards."""
        force = torch.zeros(self.grid.freedoms, dtype=torch.float64)
        for _ in range(random.integers(1, 4)):
            x, slant, weight = random.integers(3, self.grid.wide - 2), random.normal(0, 0.3), random.uniform(0.3, 1)
            place = self.grid.freedom(int(x), 0 if random.random() < 0.5 else self.grid.high // 2)
            force[place] += weight * slant
            force[place + 1] += weight
        return force

    def picture(self, parameters: Parameters, data: Any) -> NDArray[np.float64]:
        """Returns densities as an image; 0 (black) = material."""
        image: NDArray[np.float64] = 1 - parameters["density"].reshape(self.grid.wide, self.grid.high).T.numpy()
        return np.kron(image, np.ones((6, 6)))


class Truss(Bridges, fedmeta.Problem):
    """A Warren truss of panels of length 1: what sizing and shape share. Volume and Young's modulus are 1."""

    metrics = (fedmeta.Metric("log_compliance", higher_is_better=False),)

    def __init__(self, bridges: int = 40, panels: int = 6) -> None:
        self.bridges, self.panels = bridges, panels
        n = panels  # lower nodes 0 to n, upper ones n + 1 to 2 n
        chords = [(k, k + 1) for k in range(n)] + [(n + 1 + k, n + 2 + k) for k in range(n - 1)]
        self.bars = torch.tensor(chords + [(k + side, n + 1 + k) for k in range(n) for side in (0, 1)])

    def work(self, heights: Tensor, data: Any) -> Tensor:
        """Returns |N| L of each bar, with N its force by equilibrium at the nodes alone and L its length."""
        n = self.panels
        x = torch.cat([torch.arange(n + 1), torch.arange(n) + 0.5]).to(heights)
        places = torch.stack([x, torch.cat([heights.new_zeros(n + 1), heights])], 1)
        along = places[self.bars[:, 1]] - places[self.bars[:, 0]]
        length = along.square().sum(1).sqrt()
        ends = torch.nn.functional.one_hot(self.bars, 2 * n + 1).to(heights)
        balance = torch.einsum("bn,bd->ndb", ends[:, 1] - ends[:, 0], along / length[:, None]).reshape(-1, len(length))
        free = torch.tensor([k for k in range(2 * (2 * n + 1)) if k not in (0, 1, 2 * n + 1)])
        force = torch.linalg.solve(balance[free], data["force"][free])
        return (force.square() + 1e-12).sqrt() * length

    def load(self, random: np.random.Generator) -> Tensor:
        """Returns loads on the lower chord."""
        force = torch.zeros(2 * self.panels + 1, 2, dtype=torch.float64)
        force[1 : self.panels, 1] = torch.tensor(-random.exponential(1.0, self.panels - 1))
        return force.reshape(-1)


class Sizing(Truss):
    """Each bar's share of the volume; compliance is the sum of (|N| L)^2 / share. Optimum: shares as |N| L."""

    solver = OptimalityCriteria(lowest=1e-6)

    def init(self, seed: int) -> Parameters:
        """Returns equal shares."""
        return {"shares": torch.full((4 * self.panels - 1,), 1 / (4 * self.panels - 1), dtype=torch.float64)}

    def constrain(self, parameters: Parameters) -> Parameters:
        """Returns shares of the volume."""
        return {"shares": project(parameters["shares"], 1 / (4 * self.panels - 1), 1e-6)}

    def inner(self, parameters: Parameters, data: Any) -> Tensor:
        """Returns compliance at height 1."""
        return (self.work(parameters["shares"].new_ones(self.panels), data).square() / parameters["shares"]).sum()

    def sensitivity(self, parameters: Parameters, data: Any) -> Parameters:
        """Returns the derivative of compliance by each share."""
        work, shares = self.work(parameters["shares"].new_ones(self.panels), data), parameters["shares"]
        return {"shares": -(work / shares).square()}

    def outer(self, parameters: Parameters, data: Any) -> Tensor:
        """Returns log compliance."""
        return self.inner(parameters, data).log()


class Shape(Truss):
    """The upper nodes' heights, with bars of optimal thickness: compliance is the square of the sum of |N| L."""

    def init(self, seed: int) -> Parameters:
        """Returns heights of 1."""
        return {"heights": torch.ones(self.panels, dtype=torch.float64)}

    def inner(self, parameters: Parameters, data: Any) -> Tensor:
        """Returns log compliance."""
        return 2 * self.work(parameters["heights"], data).sum().log()
