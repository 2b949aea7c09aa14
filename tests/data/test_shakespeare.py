from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedmeta.data import (
    ArrayPopulation,
    Standardisation,
    class_codes,
    evaluation_episodes,
    gather,
    load,
    split,
    training_episodes,
)
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Data

AS_IS = Standardisation(np.zeros(1, np.float32), np.ones(1, np.float32))
SYMBOLS = ("a", "b", "c", "d", "e")


def plays(folder: Path, lengths: tuple[int, ...] = (100, 79, 81, 250), **changes: Any) -> str:
    """Writes roles with texts of these lengths, in an alphabet that is not sorted."""
    text = np.random.default_rng(0).integers(0, 5, sum(lengths))
    good: dict[str, Any] = {
        "x": text.astype(np.uint8),
        "offset": np.cumsum([0, *lengths]),
        "site_names": np.array([f"play|{name}" for name in ("PUCK", "BRIEF", "ARIEL", "LEAR")[: len(lengths)]]),
        "vocab": np.array(["e", "a", "d", "b", "c"]),
    }
    np.savez(folder / "plays.npz", **{name: value for name, value in (good | changes).items() if value is not None})
    return str(folder / "plays.npz")


def read(path: str, **keys: Any) -> tuple[ArrayPopulation, Data]:
    data = Data(source="shakespeare", path=path, **{"split": "blocks", **keys})
    there = load(data)
    assert isinstance(there, ArrayPopulation)
    return there, data


@pytest.mark.parametrize("stride", [1, 7, 200])
def test_rows_are_windows_of_a_roles_own_text(tmp_path: Path, stride: int) -> None:
    path = plays(tmp_path)
    there, _ = read(path, stride=stride)
    raw = np.load(path)
    texts = {
        str(name): "".join(raw["vocab"][raw["x"][start:stop]])
        for name, start, stop in zip(raw["site_names"], raw["offset"], raw["offset"][1:], strict=False)
    }
    assert there.names == ("play|ARIEL", "play|LEAR", "play|PUCK")
    assert (there.tokens, there.shape, there.class_names) == (True, (80,), SYMBOLS)
    for site, name in enumerate(there.names):
        rows = there.sites.of(site)
        windows = ["".join(SYMBOLS[code] for code in row) for row in there.features(rows).tolist()]
        following = [SYMBOLS[code] for code in there.labels(rows)]
        own = texts[name]
        starts = range(0, len(own) - 80, stride)
        assert windows == [own[start : start + 80] for start in starts]
        assert following == [own[start + 80] for start in starts]


def test_the_text_is_held_once(tmp_path: Path) -> None:
    there, _ = read(plays(tmp_path))
    assert there.x.strides == (1, 1)
    assert np.shares_memory(there.x[0], there.x[1])


def test_no_test_character_is_read_in_training(tmp_path: Path) -> None:
    there, data = read(plays(tmp_path, (100, 400)), stride=3)
    rows = split(there, data, 0)
    train, test = rows.train_rows(there.all_sites), rows.test_rows(there.all_sites)
    for site in there.all_sites:
        read_in_training = {start + place for start in train.of(site).tolist() for place in range(81)}
        assert not read_in_training & {start + 80 for start in test.of(site).tolist()}


def test_batches_hold_codes(tmp_path: Path) -> None:
    there, data = read(plays(tmp_path), min_rows=2)
    assert there.names == ("play|LEAR", "play|PUCK")
    rows = split(there, data, 0)
    codes = class_codes(there.class_names, SYMBOLS)
    batch = gather(there, training_episodes(rows, there.all_sites, 1, 4, 4), AS_IS, codes)
    assert str(batch.support[0].dtype) == "torch.int64"
    assert batch.support[0].shape == (2, 4, 80)
    scored_rows = gather(there, evaluation_episodes(rows, there.all_sites, 4), AS_IS, codes)
    assert scored_rows.query[2].sum(1).tolist() == rows.test_sizes(there.all_sites).tolist()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"vocab": None}, 'no array "vocab"'),
        ({"vocab": np.array(["a", "b"])}, "one code below 2"),
        ({"vocab": np.array(["a", "b", "a", "d", "e"])}, "twice"),
        ({"site_names": np.array(["one"])}, 'one step for each of "site_names"'),
        ({"offset": np.array([0, 100, 90, 260, 510])}, "must rise from 0 to 510"),
        ({"x": np.zeros((510, 2))}, "one code below 5"),
    ],
)
def test_wrong_arrays(tmp_path: Path, changes: Any, expected: str) -> None:
    with pytest.raises(FedmetaError, match=expected):
        read(plays(tmp_path, **changes))


def test_a_random_split_of_windows_that_overlap_is_refused(tmp_path: Path) -> None:
    path = plays(tmp_path)
    with pytest.raises(FedmetaError, match=r'data\.split = "random" would test on text that overlaps'):
        read(path, split="random", stride=80)
    there, _ = read(path, split="random", stride=81)
    assert there.sizes(there.all_sites).tolist() == [1, 3, 1]


def test_no_role_is_long_enough(tmp_path: Path) -> None:
    with pytest.raises(
        FedmetaError, match=r"no role has data\.min_rows = 30 windows of 80 characters; the largest has 17"
    ):
        read(plays(tmp_path), min_rows=30)
    with pytest.raises(FedmetaError, match="the largest has 0"):
        read(plays(tmp_path, (20, 30)))


def test_the_real_plays(shared_data: Path) -> None:
    there, _ = read(str(shared_data / "shakespeare" / "shakespeare.npz"), stride=80)
    assert (len(there), len(there.class_names)) == (1050, 80)
    hamlet = there.sites.of(there.names.index("hamlet|HAMLET"))
    words = "".join(there.class_names[code] for code in there.features(hamlet[:2]).flatten().tolist())
    assert "A little more than kin, and less than kind." in words
    assert words[80] == there.class_names[int(there.labels(hamlet[:1])[0])]
