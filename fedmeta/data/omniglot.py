"""Omniglot (Lake, Salakhutdinov and Tenenbaum, Science 2015): 1 623 characters, each drawn by 20 people.

A site is an alphabet, and its characters are what few-shot tasks draw their classes from. With `data.split =
"characters"` a site is as many characters drawn from all alphabets, as in the published protocol (Vinyals et al.,
NeurIPS 2016; Finn et al. 2017), whose test characters are new and whose alphabets are not.
"""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedmeta.data.arrays import build_population
from fedmeta.data.labels import Labels
from fedmeta.data.npz_file import read_arrays
from fedmeta.data.population import ArrayPopulation
from fedmeta.data.ragged import IntArray
from fedmeta.errors import FedmetaError, nearest
from fedmeta.experiment import Data
from fedmeta.randomness import draws

ARCHIVES = ("images_background.zip", "images_evaluation.zip")
"""The original archives; the published split is that of alphabets, 30 in the first and 20 in the second."""

SIDE = 28
"""Pixels of a side, to which drawings of 105 x 105 are reduced as in the papers."""

_BROKEN = (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError)


class _Drawings(NamedTuple):
    """Images [drawings, 28, 28], ink = 255; the character and the alphabet of each; the alphabets' names."""

    x: NDArray[np.uint8]
    characters: IntArray
    alphabets: IntArray
    names: list[str]


def load_omniglot(data: Data) -> ArrayPopulation:
    """Returns the population of alphabets in `data.path`.

    The path is an npz file with arrays `x` [drawings, 28, 28] (ink = 255), `y` (characters), `alphabet` and
    `alphabet_name`; or an original archive; or a folder with both of these, or with one npz file.

    Raises:
        FedmetaError: Nothing of the kind is there, it cannot be read, or `data.ways` is not set.
    """
    if not data.ways:
        raise FedmetaError(
            "data.ways is not set: alphabets share no character, so set how many a task draws, such as 5"
        )
    files = _files(data.path)
    drawings = _from_npz(files[0]) if files[0].suffix == ".npz" else _from_archives(files)
    if data.split == "characters":
        drawings = mixed(drawings)
    characters = int(drawings.characters.max(initial=-1)) + 1
    return build_population(
        data.path,
        drawings.x,
        Labels(drawings.characters, tuple(str(character) for character in range(characters))),
        drawings.alphabets,
        drawings.names,
        lambda row, pixel: f"{data.path}: drawing {row}, pixel {pixel}",
        min_rows=data.min_rows,
    )


def mixed(drawings: _Drawings) -> _Drawings:
    """Returns drawings whose sites are equal shares of all characters, in a fixed random order, one per alphabet."""
    characters, sites = np.unique(drawings.characters), len(drawings.names)
    order = np.argsort(draws(0, "characters", 0, characters.astype(np.uint64)), kind="stable")
    site_of = np.empty(len(characters), dtype=np.int64)
    site_of[order] = np.arange(len(characters)) % sites
    owners = site_of[np.searchsorted(characters, drawings.characters)]
    width = len(str(sites - 1))
    names = [f"characters-{site:0{width}d}" for site in range(sites)]
    return drawings._replace(alphabets=owners, names=names)


def _files(path: str) -> list[Path]:
    """Returns the npz file, or the archives, that a path stands for."""
    file = Path(path).expanduser()
    if file.is_file():
        return [file]
    if not file.is_dir():
        beside = [other.name for other in file.parent.iterdir()] if file.parent.is_dir() else []
        raise FedmetaError(f"data.path: {path}: no such file or folder{nearest(file.name, beside)}")
    archives = [file / name for name in ARCHIVES if (file / name).is_file()]
    found = archives or sorted(file.glob("*.npz"))
    if not found or (len(found) > 1 and not archives):
        raise FedmetaError(f"data.path: {path} has neither {' nor '.join(ARCHIVES)}, nor one npz file")
    return found


def _from_npz(path: Path) -> _Drawings:
    arrays = read_arrays(path, ("x", "y", "alphabet"), ("alphabet_name",))
    x, characters, alphabets = arrays["x"], arrays["y"], arrays["alphabet"]
    if (
        x.ndim != 3
        or x.dtype.kind not in "uif"
        or any(array.dtype.kind not in "ui" for array in (characters, alphabets))
    ):
        raise FedmetaError(
            f'{path}: array "x" must hold images [drawings, height, width], and "y" and "alphabet" whole numbers'
        )
    numbers, owners = np.unique(alphabets, return_inverse=True)
    names = [str(name) for name in arrays.get("alphabet_name", np.array([f"alphabet-{n:02d}" for n in numbers]))]
    if "alphabet_name" in arrays:
        if len(numbers) and not 0 <= numbers[0] <= numbers[-1] < len(names):
            raise FedmetaError(f'{path}: array "alphabet" goes to {numbers[-1]}, but there are {len(names)} names')
        names = [names[number] for number in numbers]
    codes = np.unique(characters, return_inverse=True)[1]
    return _Drawings(x, codes.astype(np.int64), owners.astype(np.int64), names)


def _from_archives(paths: list[Path]) -> _Drawings:
    """Returns the drawings of archives whose images are .../ALPHABET/CHARACTER/NAME.png."""
    images: list[NDArray[np.uint8]] = []
    places: list[tuple[str, str]] = []
    for path in paths:
        try:
            for alphabet, character, image in _images(path):
                images.append(image)
                places.append((alphabet, character))
        except _BROKEN as error:
            raise FedmetaError(f"{path} cannot be read: {error}") from None
    if not images:
        raise FedmetaError(f"{paths[0]}: no image ALPHABET/CHARACTER/NAME.png in it")
    pairs = sorted(set(places))
    names = sorted({alphabet for alphabet, _ in pairs})
    character_of = {pair: number for number, pair in enumerate(pairs)}
    alphabet_of = {name: number for number, name in enumerate(names)}
    return _Drawings(
        np.stack(images),
        np.array([character_of[place] for place in places], dtype=np.int64),
        np.array([alphabet_of[alphabet] for alphabet, _ in places], dtype=np.int64),
        names,
    )


def _images(path: Path) -> Iterator[tuple[str, str, NDArray[np.uint8]]]:
    """Yields the alphabet, the character and the reduced image of each drawing of an archive, by name."""
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            parts = name.split("/")
            if name.endswith(".png") and len(parts) >= 3 and "__MACOSX" not in parts:
                with Image.open(io.BytesIO(archive.read(name))) as image:
                    small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
                yield parts[-3], parts[-2], 255 - np.asarray(small, dtype=np.uint8)
