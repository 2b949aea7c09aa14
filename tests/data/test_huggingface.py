from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedmeta.data import ArrayPopulation, load
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Data, Experiment

datasets = pytest.importorskip("datasets", reason='the extra is not installed: pip install "fedmeta[huggingface]"')
pytest.importorskip("flwr_datasets", reason='the extra is not installed: pip install "fedmeta[huggingface]"')

PEOPLE = ["ann", "bob", "cyd"]


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps what the library writes in the test's folder, and keeps it off the network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def made(**changes: Any) -> Any:
    """Thirty rows of two numbers, a label and a person."""
    columns: dict[str, Any] = {
        "height": np.arange(30) / 2,
        "weight": np.arange(30) % 7,
        "sick": np.arange(30) % 2,
        "person": [PEOPLE[row % 3] for row in range(30)],
    }
    return datasets.Dataset.from_dict({name: value for name, value in (columns | changes).items() if value is not None})


def images(*sides: int) -> Any:
    """Images of these sides, each of its row's number, with named classes."""
    features = {
        "image": datasets.Image(),
        "kind": datasets.ClassLabel(names=["cat", "dog"]),
        "person": datasets.Value("string"),
    }
    rows = {
        "image": [Image.fromarray(np.full((side, side), row, np.uint8)) for row, side in enumerate(sides)],
        "kind": [row % 2 for row in range(len(sides))],
        "person": [PEOPLE[row % 3] for row in range(len(sides))],
    }
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def saved(folder: Path, rows: Any) -> str:
    rows.save_to_disk(str(folder / "saved"))
    return str(folder / "saved")


def read(path: str, **keys: Any) -> ArrayPopulation:
    there = load(Data(source="huggingface", path=path, **{"label": "sick", "site_key": "person", **keys}))
    assert isinstance(there, ArrayPopulation)
    return there


def in_memory(folder: Path) -> str:
    return saved(folder, made())


def with_splits(folder: Path) -> str:
    return saved(folder, datasets.DatasetDict({"test": made().select(range(6)), "train": made()}))


def of_parquet(folder: Path) -> str:
    (folder / "files").mkdir()
    made().to_parquet(folder / "files" / "train.parquet")
    return str(folder / "files")


@pytest.mark.parametrize("written", [in_memory, with_splits, of_parquet])
def test_a_site_is_a_value_of_a_column(tmp_path: Path, written: Any) -> None:
    there = read(written(tmp_path))
    assert (there.names, there.class_names) == (("ann", "bob", "cyd"), ("0", "1"))
    assert there.feature_names == ("height", "weight")
    for site in range(3):
        rows = np.arange(site, 30, 3)
        own = there.sites.of(site)
        assert there.x[own].tolist() == np.stack([rows / 2, rows % 7], axis=1).tolist()
        assert there.y[own].tolist() == (rows % 2).tolist()


def test_another_split_and_chosen_columns(tmp_path: Path) -> None:
    there = read(with_splits(tmp_path), part="test", columns=("weight",))
    assert (len(there.x), there.feature_names) == (6, ("weight",))


def test_a_configuration_of_a_folder(tmp_path: Path) -> None:
    path = of_parquet(tmp_path)
    made().select(range(12)).to_parquet(tmp_path / "files" / "few.parquet")
    configurations = "".join(f"- config_name: {name}\n  data_files: {name}.parquet\n" for name in ("train", "few"))
    (tmp_path / "files" / "README.md").write_text(f"---\nconfigs:\n{configurations}---\n")
    assert len(read(path, subset="few").x) == 12
    assert len(read(path, subset="train").x) == 30
    with pytest.raises(FedmetaError, match=r"Config name is missing\. Please pick one .*'train', 'few'"):
        read(path)


def test_rows_are_dealt_by_a_dirichlet_draw(tmp_path: Path) -> None:
    path = saved(tmp_path, made(person=None))
    there = read(path, dirichlet=0.3, sites=4)
    assert there.names == ("site-0", "site-1", "site-2", "site-3")
    assert sorted(there.sites.rows.tolist()) == list(range(30))
    assert len(set(there.sizes(there.all_sites).tolist())) > 1
    assert read(path, dirichlet=0.3, sites=4).digest == there.digest
    alike = read(path, dirichlet=1e6, sites=3)
    assert [np.bincount(alike.y[alike.sites.of(site)]).tolist() for site in range(3)] == [[5, 5]] * 3
    few = read(path, dirichlet=0.05, sites=20, min_rows=2)
    assert few.sizes(few.all_sites).min() >= 2


def test_images_and_named_classes(tmp_path: Path) -> None:
    there = read(saved(tmp_path, images(*[4] * 9)), label="kind")
    assert (there.shape, there.x.dtype, there.class_names) == ((4, 4), np.uint8, ("cat", "dog"))
    assert there.x[:, 0, 0].tolist() == list(range(9))
    assert there.feature_names == ()
    tasks = read(saved(tmp_path / "again", images(*[4] * 9)), label="kind", ways=2, rotations=True)
    assert tasks.class_names == ("way 0", "way 1")


def test_missing_numbers_and_labels_that_are_numbers(tmp_path: Path) -> None:
    weights = [None, *range(29)]
    there = read(saved(tmp_path, made(weight=weights, sick=np.arange(30) / 4)))
    assert there.regression
    assert there.missing
    assert np.isnan(there.x[:, 1]).tolist() == [True, *[False] * 29]


@pytest.mark.parametrize(
    ("rows", "keys", "expected"),
    [
        (made, {"label": "sik"}, r'no column "sik" \(data\.label\); it has .*did you mean "sick"'),
        (made, {"site_key": "site"}, r'no column "site" \(data\.site_key\)'),
        (made, {"columns": ("age",)}, r'no column "age" \(data\.columns\)'),
        (made, {"part": "test"}, None),
        (made, {"site_key": "sick"}, r'column "person" is Value\(.string.\).*features must be numbers'),
        (lambda: made(sick=[None, *[1] * 29]), {}, r'row 0 \(from 0\), column "sick" is missing'),
        (lambda: made(person=[*["ann"] * 29, None]), {}, r'row 29 \(from 0\), column "person" is missing'),
        (lambda: made(weight=[np.inf] * 30), {}, r'row 0 \(from 0\), column "weight" is inf'),
        (lambda: made(height=None, weight=None), {}, "there is no feature column"),
        (lambda: images(4, 5, 4), {"label": "kind"}, 'column "image" is .*or images of one size'),
        (made, {"dirichlet": 1.0, "sites": 50}, "number of partitions needs to be smaller"),
        (made, {"min_rows": 11}, r"no site has data\.min_rows = 11 rows; the largest has 10"),
    ],
)
def test_what_cannot_be_used(tmp_path: Path, rows: Any, keys: Any, expected: str | None) -> None:
    path = saved(tmp_path, rows())
    if expected is None:
        assert len(read(path, **keys)) == 3, "a saved data set without splits is used whole"
        return
    with pytest.raises(FedmetaError, match=expected) as error:
        read(path, **keys)
    assert "\n" not in str(error.value)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FedmetaError, match=r'no split "validation" \(data\.part\); it has test, train'):
        read(with_splits(tmp_path), part="validation")
    with pytest.raises(FedmetaError, match=r"files cannot be read as a Hugging Face data set: .*'valid'.*not present"):
        read(of_parquet(tmp_path), part="valid")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FedmetaError, match="empty cannot be read as a Hugging Face data set"):
        read(str(tmp_path / "empty"))
    with pytest.raises(FedmetaError, match="nobody/nothing cannot be read as a Hugging Face data set"):
        read("nobody/nothing")


def test_a_folder_here_is_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = in_memory(tmp_path)
    monkeypatch.chdir(tmp_path)
    experiment = Experiment(data=Data(source="huggingface", path="saved")).absolute()
    assert experiment.data.path == path
