import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedmeta.data import (
    ArrayPopulation,
    draw_new_sites,
    gather,
    load,
    split,
    standardisation,
    train_sums,
    training_tasks,
)
from fedmeta.data.omniglot import ARCHIVES
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Data, Experiment


def read(path: Path, **keys: Any) -> ArrayPopulation:
    there = load(Data(source="omniglot", path=str(path), **{"ways": 2, **keys}))
    assert isinstance(there, ArrayPopulation)
    return there


def drawing(corner: int) -> bytes:
    """A 105 x 105 drawing on white whose ink, black, fills one of four corners."""
    pixels = np.full((105, 105), 255, np.uint8)
    row, column = divmod(corner, 2)
    pixels[row * 60 : row * 60 + 45, column * 60 : column * 60 + 45] = 0
    file = io.BytesIO()
    Image.fromarray(pixels).convert("1").save(file, "PNG")
    return file.getvalue()


def archives(folder: Path, alphabets: dict[str, list[str]]) -> Path:
    """Writes both archives, with two drawings of each of four characters of each alphabet."""
    for name, own in alphabets.items():
        with zipfile.ZipFile(folder / name, "w") as archive:
            root = name.removesuffix(".zip")
            archive.writestr(f"__MACOSX/{root}/{own[0]}/character01/._0_1.png", b"no image")
            archive.writestr(f"{root}/readme.txt", b"no image")
            for alphabet in own:
                for character in range(4):
                    for person in range(2):
                        place = f"{root}/{alphabet}/character{character + 1:02d}/{character:04d}_{person:02d}.png"
                        archive.writestr(place, drawing(character))
    return folder


def arrays(folder: Path, **changes: Any) -> Path:
    good: dict[str, Any] = {
        "x": np.arange(12 * 4, dtype=np.uint8).reshape(12, 2, 2),
        "y": np.repeat([3, 4, 8, 9], 3),
        "alphabet": np.repeat([2, 0], 6),
        "alphabet_name": np.array(["Greek", "Unused", "Arcadian"]),
    }
    np.savez(folder / "drawings.npz", **{name: value for name, value in (good | changes).items() if value is not None})
    return folder / "drawings.npz"


def test_the_original_archives(tmp_path: Path) -> None:
    folder = archives(tmp_path, {ARCHIVES[0]: ["Greek", "Arcadian"], ARCHIVES[1]: ["Tengwar"]})
    there = read(folder)
    assert there.names == ("Arcadian", "Greek", "Tengwar")
    assert (there.shape, there.x.dtype, len(there.x), there.class_names) == ((28, 28), np.uint8, 24, ("way 0", "way 1"))
    assert [len(np.unique(there.y[there.sites.of(site)])) for site in range(3)] == [4, 4, 4]
    assert len(np.unique(there.y)) == 12
    for site in range(3):
        rows = there.sites.of(site)
        for corner in range(4):
            image = there.x[rows[there.y[rows] == there.y[rows].min() + corner]].astype(int)
            row, column = divmod(corner, 2)
            own = image[:, row * 16 : row * 16 + 12, column * 16 : column * 16 + 12]
            # Ink is 255 and fills 12 x 12 of the 28 x 28 pixels.
            assert own.mean() > 245
            assert abs(image.sum(axis=(1, 2)) - own.sum(axis=(1, 2))).max() < 255 * 6
    assert read(folder / ARCHIVES[1]).names == ("Tengwar",)


def test_an_npz_file(tmp_path: Path) -> None:
    there = read(arrays(tmp_path))
    assert there.names == ("Arcadian", "Greek")
    assert there.y[there.sites.of(0)].tolist() == [0, 0, 0, 1, 1, 1]
    assert there.x[there.sites.of(1)[0]].tolist() == [[24, 25], [26, 27]]
    assert read(tmp_path).digest == there.digest
    assert read(arrays(tmp_path, alphabet_name=None)).names == ("alphabet-00", "alphabet-02")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"alphabet": None}, 'no array "alphabet"'),
        ({"y": np.zeros(12)}, "whole numbers"),
        ({"x": np.zeros((12, 4))}, "must hold images"),
        ({"alphabet_name": np.array(["a"])}, "goes to 2, but there are 1 names"),
    ],
)
def test_wrong_arrays(tmp_path: Path, changes: Any, expected: str) -> None:
    with pytest.raises(FedmetaError, match=expected):
        read(arrays(tmp_path, **changes))


def test_wrong_paths(tmp_path: Path) -> None:
    (tmp_path / "omniglot28.npz").write_text("")
    with pytest.raises(FedmetaError, match=r'no such file or folder; did you mean "omniglot28\.npz"'):
        read(tmp_path / "omniglot.npz")
    with pytest.raises(FedmetaError, match="not an npz file"):
        read(tmp_path)
    (tmp_path / "omniglot28.npz").unlink()
    with pytest.raises(FedmetaError, match=r"has neither images_background\.zip nor images_evaluation\.zip, nor one"):
        read(tmp_path)
    (tmp_path / ARCHIVES[0]).write_text("no zip")
    with pytest.raises(FedmetaError, match=r"images_background\.zip cannot be read: File is not a zip file"):
        read(tmp_path)
    with zipfile.ZipFile(tmp_path / ARCHIVES[0], "w") as archive:
        archive.writestr("a/b/c.png", b"no image")
    with pytest.raises(FedmetaError, match=r"images_background\.zip cannot be read: cannot identify image"):
        read(tmp_path)
    with zipfile.ZipFile(tmp_path / ARCHIVES[0], "w"):
        pass
    with pytest.raises(FedmetaError, match=r"images_background\.zip: no image ALPHABET"):
        read(tmp_path)


def test_characters_may_be_mixed_over_alphabets(tmp_path: Path) -> None:
    folder = archives(tmp_path, {ARCHIVES[0]: ["Greek", "Arcadian"], ARCHIVES[1]: ["Tengwar"]})
    plain, there = read(folder), read(folder, split="characters")
    assert there.names == ("characters-0", "characters-1", "characters-2")
    own = [np.unique(there.y[there.sites.of(site)]) for site in range(3)]
    assert [len(each) for each in own] == [4, 4, 4]
    assert sorted(np.concatenate(own)) == list(range(12)), "a character is at one site"
    assert np.array_equal(plain.x, there.x)
    alphabets = [{int(character) // 4 for character in each} for each in own]
    assert max(len(each) for each in alphabets) > 1
    assert read(folder, split="characters").digest == there.digest
    with pytest.raises(FedmetaError, match=r"split = .*no other has alphabets to mix"):
        Experiment().with_overrides(["data.source=synthetic", "data.split=characters"])


def test_classes_of_a_task_must_be_given() -> None:
    with pytest.raises(FedmetaError, match=r"data\.ways is not set: alphabets share no character"):
        load(Data(source="omniglot", path="anywhere"))


def test_the_real_alphabets(shared_data: Path) -> None:
    data = Data(source="omniglot", path=str(shared_data / "omniglot"), ways=20, shots=5, query=60)
    there = read(Path(data.path), ways=20)
    characters = [len(np.unique(there.y[there.sites.of(site)])) for site in there.all_sites]
    assert (min(characters), max(characters), len(there)) == (20, 55, 46)
    new = draw_new_sites(there.names, ("Tengwar", "Gurmukhi"), 0)
    training = np.setdiff1d(there.all_sites, there.find(new))
    rows = split(there, data, 0)
    scale = standardisation(train_sums(rows, training, data.standardise))
    batch = gather(there, training_tasks(rows, training[:4], 1, data), scale, np.arange(20))
    assert batch.support[0].shape == (4, 100, 28, 28)
    assert batch.query[1].shape == (4, 60)
    assert abs(float(batch.support[0].mean())) < 0.3
    assert 0.8 < float(batch.support[0].std()) < 1.2
