import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmeta.data import ArrayPopulation, load, load_site, npz_file
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Data
from tests.data.made import arrays, npz


def read(path: str, **keys: Any) -> ArrayPopulation:
    population = load(Data(source="npz", path=path, **keys))
    assert isinstance(population, ArrayPopulation)
    return population


def test_sites_are_sorted_by_name_and_keep_their_rows(tmp_path: Path) -> None:
    there = read(npz(tmp_path, site_names=[f"{chr(122 - n)}-ward" for n in range(13)]))
    assert there.names == ("n-ward", "q-ward", "u-ward")
    assert [there.sites.of(site).tolist() for site in range(3)] == [[7, 8, 9, 10, 11], [4, 5, 6], [0, 1, 2, 3]]
    assert there.class_names == ("0", "1", "2")
    assert there.feature_names == ("x0", "x1", "x2")
    assert (len(there), there.shape, there.missing, there.regression) == (3, (3,), False, False)
    assert there.find(["u-ward", "n-ward"]).tolist() == [2, 0]
    with pytest.raises(FedmetaError, match=r'no site "u-word".*did you mean "u-ward"'):
        there.find(["u-word"])


def test_integer_sites_without_names_sort_by_number(tmp_path: Path) -> None:
    assert read(npz(tmp_path)).names == ("site-05", "site-09", "site-12")
    assert read(npz(tmp_path, site=[3] * 4 + [-70000] * 3 + [10**17] * 5)).names == (
        "site--000000000000070000",
        "site-000000000000000003",
        "site-100000000000000000",
    )


def test_text_sites_and_another_key(tmp_path: Path) -> None:
    path = npz(tmp_path, ward=np.array(["b"] * 6 + ["a"] * 6), site=None)
    assert read(path, site_key="ward").names == ("a", "b")
    assert read(npz(tmp_path, site=np.array([b"b"] * 6 + [b"a"] * 6))).names == ("a", "b")


def test_time_orders_the_rows_of_a_site(tmp_path: Path) -> None:
    there = read(npz(tmp_path, time=[3.5, 1, 2, 2, 0, -1, 5, 9, 8, 7, 6, 5]))
    assert [there.sites.of(site).tolist() for site in range(3)] == [[1, 2, 3, 0], [5, 4, 6], [11, 10, 9, 8, 7]]


def test_min_rows_leaves_sites_out_without_copying(tmp_path: Path) -> None:
    there = read(npz(tmp_path), min_rows=4)
    assert there.names == ("site-05", "site-12")
    assert there.x.shape == (12, 3)
    assert there.sites.sizes.tolist() == [4, 5]
    with pytest.raises(FedmetaError, match=r"no site has data.min_rows = 6 rows; the largest has 5"):
        read(npz(tmp_path), min_rows=6)


@pytest.mark.parametrize(
    ("y", "keys", "names", "codes"),
    [
        ([10, 9, 9, 10, 9, 9, -1, 9, 9, 9, 9, 9], {}, ("-1", "9", "10"), [2, 1, 1, 2, 1, 1, 0, 1, 1, 1, 1, 1]),
        (["b", "a"] * 6, {}, ("a", "b"), [1, 0] * 6),
        (["10", "9"] * 6, {}, ("9", "10"), [1, 0] * 6),
        ([True, False] * 6, {}, ("0", "1"), [1, 0] * 6),
        ([1.0, 0.0] * 6, {"task": "classification"}, ("0", "1"), [1, 0] * 6),
        ([0, 3] * 6, {"binarise": 0.0}, ("0", "1"), [0, 1] * 6),
        ([0.5, 3.5] * 6, {"binarise": 1.0}, ("0", "1"), [0, 1] * 6),
        (["0", "4"] * 6, {"binarise": 3.0}, ("0", "1"), [0, 1] * 6),
        ([[1], [0]] * 6, {}, ("0", "1"), [1, 0] * 6),
    ],
)
def test_labels_become_codes(tmp_path: Path, y: Any, keys: dict[str, Any], names: Any, codes: list[int]) -> None:
    there = read(npz(tmp_path, y=np.array(y)), **keys)
    assert there.class_names == names
    assert there.y.tolist() == codes


def test_class_names_are_counted_by_integers_and_named_by_text(tmp_path: Path) -> None:
    names = ["low", "middle", "high", "never"]
    there = read(npz(tmp_path, class_names=names))
    assert there.class_names == tuple(names)
    assert there.y.tolist() == arrays()["y"].tolist()
    there = read(npz(tmp_path, y=np.array(["never", "low"] * 6), class_names=names))
    assert there.y.tolist() == [3, 0] * 6
    there = read(npz(tmp_path, y=np.array([3.0, 0.0] * 6), class_names=names))
    assert (there.class_names, there.y.tolist()) == (tuple(names), [3, 0] * 6)


@pytest.mark.parametrize(
    ("y", "keys"),
    [
        (np.arange(12) / 4, {}),
        (np.arange(12.0), {}),
        (np.arange(12), {"task": "regression"}),
        (np.arange(12).astype(str), {"task": "regression"}),
    ],
)
def test_numbers_are_regression(tmp_path: Path, y: Any, keys: dict[str, Any]) -> None:
    there = read(npz(tmp_path, y=y), **keys)
    assert there.regression
    assert there.class_names == ()
    assert there.y.dtype == np.float64
    assert there.y.tolist() == y.astype(float).tolist()


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "uint8", "uint16", "uint32", "uint64", "int64", "float16", ">f4", "float64", "longdouble"]
)
@pytest.mark.parametrize("shape", [(), (3,), (4, 5), (2, 3, 3)])
def test_features_of_every_type_and_shape(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).integers(0, 2, (12, *shape)).astype(dtype)
    there = read(npz(tmp_path, x=np.asfortranarray(x)))
    assert there.shape == (shape or (1,))
    assert there.x.flags.c_contiguous
    rows = np.array([11, 0, 0])
    assert there.features(rows).double().numpy().tolist() == x[rows].reshape(3, *there.shape).astype(float).tolist()


def test_missing_at_one_site_is_fine(tmp_path: Path) -> None:
    x = arrays()["x"].copy()
    x[:4, 1] = np.nan
    assert read(npz(tmp_path, x=x)).missing


LARGE = np.arange(36.0).reshape(12, 3)


@pytest.mark.parametrize("dtype", ["float32", "uint8", "bool"])
def test_large_uncompressed_arrays_are_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    read_whole = read(npz(tmp_path, x=LARGE.astype(dtype)))
    monkeypatch.setattr(npz_file, "MAP_FROM", 1)
    mapped = read(npz(tmp_path, x=LARGE.astype(dtype)))
    assert not isinstance(read_whole.x, np.memmap)
    assert isinstance(mapped.x, np.memmap)
    assert mapped.digest == read_whole.digest
    rows = np.array([3, 11, 0])
    assert mapped.features(rows).equal(read_whole.features(rows))


def test_what_cannot_be_mapped_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npz_file, "MAP_FROM", 1)
    assert not isinstance(read(npz(tmp_path, x=np.asfortranarray(LARGE))).x, np.memmap)
    np.savez_compressed(tmp_path / "sites.npz", **arrays())
    assert not isinstance(read(str(tmp_path / "sites.npz")).x, np.memmap)


def test_digests_distinguish_populations(tmp_path: Path) -> None:
    variants: list[dict[str, Any]] = [{}, {"y": np.zeros(12, int)}, {"x": LARGE}, {"site": np.arange(12) % 3}]
    digests = {read(npz(tmp_path, **changes)).digest for changes in [*variants, {}]}
    assert len(digests) == len(variants)
    assert all(len(digest) <= 36 for digest in digests)


def test_a_nodes_own_file_is_one_site(tmp_path: Path) -> None:
    path = npz(tmp_path, site=None)
    assert load_site(Data(), path).names == ("sites",)
    own = load_site(Data(min_rows=99), path, "hospital-a")
    assert own.names == ("hospital-a",)
    assert own.sizes(own.all_sites).tolist() == [12]
    with pytest.raises(FedmetaError, match=r"names 3 sites, but a node's own file is one site's"):
        load_site(Data(), npz(tmp_path))


def with_value(value: float, row: int = 6, column: int = 2) -> Any:
    x = LARGE.copy()
    x[row, column] = value
    return x


NAN_COLUMN = np.where(np.arange(3) == 1, np.nan, LARGE)
NAMES = {"feature_names": ["age", "sex", "chol"]}
CELL = r'sites\.npz: array "x", row 6 \(from 0\), column "chol", site "site-09" is '
WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no x": ({"x": None, "X": LARGE}, {}, r'sites\.npz: no array "x"; it holds y, site, X'),
    "no y": ({"y": None}, {}, r'no array "y"; it holds x, site'),
    "no site": (
        {"site": None, "sites": np.zeros(12)},
        {},
        r'no array "site"; it holds x, y, sites; did you mean "sites"',
    ),
    "no such key": ({}, {"site_key": "alphabet"}, r'no array "alphabet"'),
    "lengths": ({"y": np.zeros(11)}, {}, r'different lengths.*"x" 12, "y" 11, "site" 12'),
    "time's length": ({"time": np.zeros(13)}, {}, r'"time" 13'),
    "time missing": ({"time": with_value(np.nan)[:, 2]}, {}, r'"time" must hold one number per row'),
    "time as text": ({"time": np.array(["x"] * 12)}, {}, r'"time" must hold one number per row'),
    "no rows": ({"x": LARGE[:0], "y": [], "site": np.zeros(0, int)}, {}, r"sites\.npz: there are no rows"),
    "pickled x": ({"x": np.array([{}] * 12, dtype=object)}, {}, r'array "x" is pickled'),
    "pickled y": ({"y": np.array([None] * 12, dtype=object)}, {}, r'array "y" is pickled'),
    "x is text": ({"x": LARGE.astype(str)}, {}, r'array "x" has type <U\d+: features must be numbers'),
    "x is complex": ({"x": LARGE * 1j}, {}, r'array "x" has type complex128'),
    "x is one value": ({"x": 3.0}, {}, r'array "x" is a single value'),
    "x without features": ({"x": np.zeros((12, 0))}, {}, r"its rows are empty"),
    "y of two columns": ({"y": np.zeros((12, 2), int)}, {}, r'array "y" has shape \(12, 2\)'),
    "y missing": ({"y": with_value(np.nan)[:, 2]}, {}, r'"y", row 6 \(from 0\), site "site-09" is nan'),
    "y infinite": ({"y": with_value(np.inf)[:, 2]}, {}, r'"y", row 6 \(from 0\), site "site-09" is inf'),
    "y a fraction": (
        {"y": with_value(0.5)[:, 2]},
        {"task": "classification"},
        r"row 6 .* is 0.5, but .* whole numbers",
    ),
    "y no number": ({"y": ["1", "2", "x"] * 4}, {"task": "regression"}, r'row 2 .* is "x", but data.task'),
    "y cannot be cut": ({"y": ["1", "x", "3"] * 4}, {"binarise": 2.0}, r'row 1 .* is "x", but data.binarise'),
    "cut and regression": ({}, {"binarise": 2.0, "task": "regression"}, r"data.binarise makes two classes"),
    "class out of range": ({"class_names": ["a", "b"]}, {}, r"row 6 .* is 2, but class_names has 2 names"),
    "class not named": (
        {"y": ["lov", "high"] * 6, "class_names": ["low", "high"]},
        {},
        r'row 0 .* is "lov", not in class_names; did you mean "low"',
    ),
    "class named twice": ({"class_names": ["a", "b", "a"]}, {}, r'"class_names" has "a" twice, at 0 and 2'),
    "site named twice": ({"site_names": ["a"] * 13}, {}, r'"site_names" has "a" twice'),
    "site not named": ({"site_names": ["a", "b"]}, {}, r'site\[0\] is 5, but "site_names" has 2 names'),
    "site without a name": ({"site": np.array(["a"] * 6 + [" "] * 6)}, {}, r"site\[6\]: the site has an empty name"),
    "site a fraction": ({"site": np.zeros(12)}, {}, r'array "site" has shape \(12,\) and type float64'),
    "feature names": ({"feature_names": ["a", "b"]}, {}, r'"feature_names" has 2 names, but "x" has 3 features'),
    "infinite": ({"x": with_value(np.inf), **NAMES}, {}, CELL + "inf"),
    "infinite half": ({"x": with_value(-np.inf).astype(np.float16), **NAMES}, {}, CELL + "-inf"),
    "too large": ({"x": with_value(1e39), **NAMES}, {}, CELL + r"1e\+39, beyond what float32 holds"),
    "infinite pixel": ({"x": with_value(np.inf).reshape(12, 1, 3)}, {}, r"row 6 \(from 0\), pixel \(0, 2\)"),
    "nothing in a column": (
        {"x": NAN_COLUMN, **NAMES},
        {},
        r'column "sex" is missing \(NaN\) in every row of every site',
    ),
}


@pytest.mark.parametrize(("changes", "keys", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arrays(tmp_path: Path, changes: dict[str, Any], keys: dict[str, Any], message: str) -> None:
    with pytest.raises(FedmetaError, match=message) as error:
        read(npz(tmp_path, **changes), **keys)
    assert "\n" not in str(error.value)


def test_a_column_may_be_missing_at_a_nodes_only_site(tmp_path: Path) -> None:
    assert load_site(Data(), npz(tmp_path, x=NAN_COLUMN, site=None)).missing


def test_wrong_files(tmp_path: Path) -> None:
    good = Path(npz(tmp_path))
    with pytest.raises(FedmetaError, match=r'sitez\.npz: no such file; did you mean "sites.npz"'):
        read(str(tmp_path / "sitez.npz"))
    with pytest.raises(FedmetaError, match=r'is a folder.*data.source = "tables"'):
        read(str(tmp_path))
    np.save(tmp_path / "array.npy", LARGE)
    with pytest.raises(FedmetaError, match=r"array\.npy is not an npz file"):
        read(str(tmp_path / "array.npy"))
    (tmp_path / "other.npz").write_bytes(b"")
    with pytest.raises(FedmetaError, match=r"other\.npz is not an npz file"):
        read(str(tmp_path / "other.npz"))
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        for name in ("x", "y", "site"):
            archive.writestr(f"{name}.npy", "no array")
    with pytest.raises(FedmetaError, match=r'text\.npz: array "x" cannot be read'):
        read(str(tmp_path / "text.npz"))
    with pytest.raises(FedmetaError, match=r'did you mean "sites.npz"|no such file'):
        read(str(good) + ".bak")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_damage_to_a_file_raises_anything_but_our_own_error(
    tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    whole = Path(npz(folder)).read_bytes()
    start = data.draw(st.integers(0, len(whole) - 1))
    damaged = whole[:start] + data.draw(st.binary(max_size=8)) + whole[start + data.draw(st.integers(0, 40)) :]
    (folder / "sites.npz").write_bytes(damaged)
    with suppress(FedmetaError):
        read(str(folder / "sites.npz"))


def test_labels_and_names_follow_the_rule_of_tables(tmp_path: Path) -> None:
    labels = np.array(["1", "1.0", " 1", "01", "yes", "yes ", "1", "1", "1", "1", "1", "01"])
    sites = np.array(["a", "a ", "b"] * 4)
    there = load(Data(source="npz", path=npz(tmp_path, y=labels, site=sites, feature_names=[" p", "q ", "a\u0302ge"])))
    assert there.class_names == ("01", "1", "yes")
    assert list(there.names) == ["a", "b"]
    assert there.feature_names == ("p", "q", "\u00e2ge")
