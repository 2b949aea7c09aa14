"""The embedded population: scikit-learn's 1 797 real images of digits, dealt to 40 sites that see them differently."""

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits as read_digits
from torch.nn import functional

from fedmeta.data.arrays import build_population
from fedmeta.data.labels import Labels
from fedmeta.data.population import ArrayPopulation
from fedmeta.data.ragged import IntArray
from fedmeta.experiment import Data
from fedmeta.randomness import generator

_SITES = 40
_SEED = 0
_SKEW = 0.5
_LARGEST_ANGLE = 180.0


def load_digits(data: Data) -> ArrayPopulation:
    """Returns 40 sites with about 45 images of 8x8 pixels each (UCI's optical recognition of handwritten digits).

    Every site has its own mix of classes and its own rotation: a six at one is a nine at another, so that a site
    must be known before its digits can be read. The same in every run, whatever its seed.
    """
    images, digits = read_digits(return_X_y=True)
    draw = generator(_SEED, "digits")
    owners = deal(digits.astype(np.int64), _SITES, draw)
    angles = draw.uniform(-_LARGEST_ANGLE, _LARGEST_ANGLE, _SITES)
    x = turn(images.reshape(-1, 8, 8).astype(np.float32), angles[owners])
    return build_population(
        "digits",
        x,
        Labels(digits.astype(np.int64), tuple(str(digit) for digit in range(10))),
        owners,
        [f"site-{site:02d}" for site in range(_SITES)],
        lambda row, column: f"digits: image {row}, pixel {column}",
        min_rows=data.min_rows,
    )


def deal(digits: IntArray, sites: int, draw: np.random.Generator) -> IntArray:
    """Returns the site of each image [images]: sizes within a third of their mean, classes by a Dirichlet draw each.

    Images are dealt one at a time to sites in random turn, by the site's own mix of the classes still in hand.
    """
    classes = int(digits.max()) + 1
    shares = draw.uniform(0.75, 1.25, sites)
    bounds = np.floor(np.cumsum(shares) / shares.sum() * len(digits) + 0.5).astype(np.int64)
    mixes = draw.dirichlet(np.full(classes, _SKEW), sites)
    hands = [draw.permutation(np.flatnonzero(digits == digit)).tolist() for digit in range(classes)]
    owners = np.empty(len(digits), dtype=np.int64)
    for site in draw.permutation(np.repeat(np.arange(sites), np.diff(bounds, prepend=0))):
        left = mixes[site] * [len(hand) > 0 for hand in hands]
        digit = int(np.searchsorted(np.cumsum(left), draw.random() * left.sum(), side="right"))
        owners[hands[digit].pop()] = site
    return owners


def turn(images: NDArray[np.float32], angles: NDArray[np.float64]) -> NDArray[np.float32]:
    """Returns images [n, height, width], each turned about its centre by its angle [n] in degrees, bilinearly."""
    radians = torch.from_numpy(np.deg2rad(angles).astype(np.float32))
    cosine, sine, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    rotations = torch.stack([cosine, -sine, zero, sine, cosine, zero], dim=1).view(-1, 2, 3)
    pixels = torch.from_numpy(images)[:, None]
    grid = functional.affine_grid(rotations, list(pixels.shape), align_corners=False)
    turned: NDArray[np.float32] = functional.grid_sample(pixels, grid, align_corners=False)[:, 0].numpy()
    return turned
