"""Source-mask optimization: a chip's pattern is printed by light of 193 nm, whose half is wider than the lines.

Light from points of a source (sigma, in the pupil's units) passes a mask M and a lens of numerical aperture 1.35 in
water; each point makes an image, and their intensities add up (Abbe):

    I = sum_s J_s |F^-1 [ P(f + f_s) F[M] ]|^2 / sum_s J_s,   P = 1 within NA / wavelength, with a phase for defocus

Resist prints where dose times I exceeds .225. The loss is the squared error of the print in focus, plus those at 102 %
dose in focus and 98 % dose at 40 nm defocus, over the target's area: fidelity and process window.

Inner problem: correct the mask of one clip by five gradient steps, from the target itself. Outer problem: the source,
which is the same for all masks of a machine: points on a simplex, symmetric in x and y. A site is a clip of the ICCAD
2013 contest (Banerjee et al.), ten in all.
"""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

import fedmeta
from fedmeta.errors import FedmetaError
from fedmeta.problems.problem import Parameters
from fedmeta.problems.solvers import Rates, gradient

WAVELENGTH, APERTURE, WATER = 193.0, 1.35, 1.44
FIELD, PIXEL, FINE = 1024, 16, 4
"""Side of the field, of a pixel of the mask, and of one where prints are measured (nm)."""

THRESHOLD, STEEPNESS, DEFOCUS, DOSES = 0.225, 50.0, 40.0, (0.98, 1.02)


def points() -> Tensor:
    """Returns the source's points [n, 2] in the pupil's units, on a grid of nine within .96."""
    axis = torch.linspace(-1, 1, 9, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    return grid[grid.square().sum(1) <= 0.96**2]


POINTS = points()
ORBITS, ORBIT = torch.unique((POINTS.abs() * 1000).round(), dim=0, return_inverse=True)
"""Points that symmetry makes alike, and which of them each point belongs to."""


def pupils(pixel: int, defocus: float) -> Tensor:
    """Returns the lens [points, n, n] as each point sees it, on a grid of frequencies of this pixel (nm)."""
    f = torch.fft.fftfreq(FIELD // pixel, pixel, dtype=torch.float64)
    x, y = (POINTS[:, axis, None, None] * APERTURE / WAVELENGTH for axis in (0, 1))
    radius = (f[:, None] + x) ** 2 + (f + y) ** 2
    height = ((WATER / WAVELENGTH) ** 2 - radius).clamp(min=0).sqrt() - WATER / WAVELENGTH
    return (radius <= (APERTURE / WAVELENGTH) ** 2) * torch.exp(2j * math.pi * defocus * height)


@functools.cache
def lenses(pixel: int) -> tuple[Tensor, Tensor]:
    """Returns the lens in focus and out of focus, on a grid of this pixel (nm)."""
    return pupils(pixel, 0.0), pupils(pixel, DEFOCUS)


def aerial(mask: Tensor, source: Tensor, lens: Tensor) -> Tensor:
    """Returns the intensity [n, n] behind a mask [n, n] for a source's weights [points] of sum 1."""
    lens = lens.to(torch.complex64 if mask.dtype == torch.float32 else torch.complex128)
    fields = torch.fft.ifft2(torch.fft.fft2(mask) * lens)
    return torch.einsum("s,sxy->xy", source, fields.real.square() + fields.imag.square())


def read_clip(path: Path, pixel: int = PIXEL) -> Tensor:
    """Returns a clip's pattern [n, n] of zeros and ones, centered, by the pixel; one unit of the file is 1 nm."""
    shapes = []
    for line in path.read_text(encoding="utf-8").splitlines():
        numbers = [int(number) for number in re.findall(r"-?\d+", line.partition("M1")[2])]
        if line.strip().startswith("RECT"):
            x, y, wide, high = numbers
            shapes.append([(x, y), (x + wide, y), (x + wide, y + high), (x, y + high)])
        elif line.strip().startswith("PGON"):
            shapes.append(list(zip(numbers[::2], numbers[1::2], strict=True)))
    corners = np.array([corner for shape in shapes for corner in shape])
    shift = (FIELD - corners.max(0) - corners.min(0)) // 2
    image = Image.new("L", (FIELD, FIELD))
    for shape in shapes:
        ImageDraw.Draw(image).polygon([tuple((np.array(corner) + shift).tolist()) for corner in shape], fill=1)
    whole = np.array(image, dtype=np.float64).reshape(FIELD // pixel, pixel, FIELD // pixel, pixel)
    return torch.tensor(whole.mean((1, 3)).round(), dtype=torch.float32)


def finer(image: Tensor) -> Tensor:
    """Returns an image on the grid where prints are measured."""
    return image.repeat_interleave(PIXEL // FINE, 0).repeat_interleave(PIXEL // FINE, 1)


class FromTheTarget(fedmeta.Solver):
    """Gradient descent on the mask that begins at the target for every clip, so that only the source is learned."""

    def solve(
        self, problem: fedmeta.Problem, parameters: Parameters, data: Any, steps: int, rates: Rates
    ) -> list[Parameters]:
        """Returns the path of `steps` steps."""
        path = [{**parameters, "correction": torch.zeros_like(parameters["correction"])}]
        for _ in range(steps):
            own = path[-1]
            found = gradient(lambda p: problem.inner(p, data), own, ("correction",))
            path.append({**own, "correction": own["correction"] - rates["correction"] * found["correction"]})
        return path


def shape_of(name: str) -> Tensor:
    """Returns raw values [orbits] of a textbook source: annular, conventional or quadrupole."""
    x, y = (ORBITS / 1000).T
    radius = torch.hypot(x, y)
    lit = {"annular": radius > 0.6, "conventional": radius < 0.7, "quadrupole": (radius > 0.6) & (x * y > 0.18)}
    return torch.where(lit[name], 2.0, -2.0)


class Lithography(fedmeta.Problem, fedmeta.TaskSource):
    """Clips under one source.

    Args:
        folder: Where the contest's clips are.
        start: The source to start from.
    """

    metrics = (
        fedmeta.Metric("loss", higher_is_better=False),
        fedmeta.Metric("l2", higher_is_better=False, unit="nm^2 printed wrongly"),
        fedmeta.Metric("pvb", higher_is_better=False, unit="nm^2 that the process decides"),
    )
    shared = ("source",)
    solver = FromTheTarget()
    held_out = False  # a clip is one pattern

    def __init__(self, folder: str = "../shared/data/iccad2013", start: str = "annular") -> None:
        self.start = start
        files = sorted(Path(folder).glob("M1_test*.glp"))
        if not files:
            raise FedmetaError(f"problem.folder = {folder}: there is no M1_test*.glp of the ICCAD 2013 contest")
        self.clips = {f"clip-{int(file.stem[7:]):02d}": read_clip(file) for file in files}

    def init(self, seed: int) -> Parameters:
        """Returns the textbook source, and no correction."""
        side = FIELD // PIXEL
        return {"source": shape_of(self.start), "correction": torch.zeros(side, side)}

    def constrain(self, parameters: Parameters) -> Parameters:
        """Returns the source's weights [points]: symmetric, positive, of sum 1."""
        weights = parameters["source"].sigmoid()[ORBIT]
        return {**parameters, "source": weights / weights.sum()}

    def inner(self, parameters: Parameters, data: Any) -> Tensor:
        """Returns the loss of a gray mask."""
        target = data["target"]
        mask = (4 * (2 * target - 1 + parameters["correction"])).sigmoid()
        focused, blurred = (aerial(mask, parameters["source"], lens) for lens in lenses(PIXEL))
        prints = ((1.0, focused), (DOSES[1], focused), (DOSES[0], blurred))
        errors = [(STEEPNESS * (dose * image - THRESHOLD)).sigmoid() - target for dose, image in prints]
        return torch.stack([error.square().sum() for error in errors]).sum() / target.sum()

    def prints(self, parameters: Parameters, data: Any) -> dict[str, Tensor]:
        """Returns the binary mask, its images and prints on the fine grid."""
        mask = finer((2 * data["target"] - 1 + parameters["correction"] > 0).to(data["target"]))
        focused, blurred = (aerial(mask, parameters["source"], lens) for lens in lenses(FINE))
        return {
            "mask": mask,
            "image": focused,
            "print": (focused > THRESHOLD).to(mask),
            "outer": (DOSES[1] * focused > THRESHOLD).to(mask),
            "inner": (DOSES[0] * blurred > THRESHOLD).to(mask),
        }

    def evaluate(self, parameters: Parameters, data: Any) -> dict[str, Tensor]:
        """Returns the loss, the area printed wrongly, and the area between the outermost and the innermost print."""
        found, target = self.prints(parameters, data), finer(data["target"])
        wrong = (found["print"] - target).abs().sum() * FINE**2
        return {
            "loss": self.inner(parameters, data), "l2": wrong,
            "pvb": (found["outer"] - found["inner"]).abs().sum() * FINE**2,
        }  # fmt: skip

    def picture(self, parameters: Parameters, data: Any) -> NDArray[np.float64]:
        """Returns target, mask, image and print side by side."""
        found = self.prints(parameters, data)
        parts = [finer(data["target"]), found["mask"], (found["image"] / (2 * THRESHOLD)).clamp(max=1), found["print"]]
        return torch.cat(parts, 1).numpy().astype(float)

    def sites(self) -> list[str]:
        """Returns the clips' names."""
        return sorted(self.clips)

    def task(self, site: str, purpose: str, round: int, seed: int) -> fedmeta.Task:
        """Returns a clip, twice."""
        return fedmeta.Task({"target": self.clips[site]}, {"target": self.clips[site]})
