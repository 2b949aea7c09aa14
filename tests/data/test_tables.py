from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedmeta.data import ArrayPopulation, load, load_site
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Data

NORTH = "age,sex,label\n61,1,yes\n54,0,no\n,1,yes\n"
SOUTH = "sex,label,age\n0,no,40.5\n1,yes,?\n"


def folder(where: Path, **files: str) -> str:
    for name, text in files.items():
        (where / f"{name}.csv").write_text(text)
    return str(where)


def read(path: str, **keys: Any) -> ArrayPopulation:
    population = load(Data(source="tables", path=path, **keys))
    assert isinstance(population, ArrayPopulation)
    return population


def test_a_file_is_a_site_and_columns_go_by_name(tmp_path: Path) -> None:
    (tmp_path / ".hidden.csv").write_text("nothing")
    (tmp_path / "notes.md").write_text("nothing")
    there = read(folder(tmp_path, south=SOUTH, north=NORTH))
    assert there.names == ("north", "south")
    assert there.feature_names == ("age", "sex")
    assert there.class_names == ("no", "yes")
    assert there.y.tolist() == [1, 0, 1, 0, 1]
    np.testing.assert_array_equal(there.x, [[61, 1], [54, 0], [np.nan, 1], [40.5, 0], [np.nan, 1]])
    assert there.missing
    assert [there.sites.of(site).tolist() for site in range(2)] == [[0, 1, 2], [3, 4]]


def test_parquet_beside_csv(tmp_path: Path) -> None:
    frame = pd.DataFrame({"sex": [True, False], "age": pd.array([1, None], dtype="Int64"), "label": ["no", "yes"]})
    frame.to_parquet(tmp_path / "west.parquet", index=False)
    there = read(folder(tmp_path, north=NORTH))
    assert there.names == ("north", "west")
    np.testing.assert_array_equal(there.x[3:], [[1, 1], [np.nan, 0]])
    assert there.y[3:].tolist() == [0, 1]


def test_row_numbers_of_pandas_are_no_feature(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"site": [0, 1, 0, 1], "age": [61, 54, 40, 30], "sex": [1, 0, 1, 0], "label": ["no", "yes"] * 2}
    )
    for site, own in frame.groupby("site"):
        own.drop(columns="site").to_parquet(tmp_path / f"site-{site}.parquet")
    there = read(folder(tmp_path, north=NORTH))
    assert there.feature_names == ("age", "sex")
    assert there.names == ("north", "site-0", "site-1")


def test_suffixes_may_be_capital(tmp_path: Path) -> None:
    (tmp_path / "WEST.CSV").write_text(NORTH)
    pd.read_csv(tmp_path / "WEST.CSV").to_parquet(tmp_path / "EAST.PARQUET")
    assert read(folder(tmp_path, north=NORTH)).names == ("EAST", "WEST", "north")
    assert load_site(Data(), str(tmp_path / "EAST.PARQUET")).names == ("EAST",)


def test_files_without_header(tmp_path: Path) -> None:
    (tmp_path / "a.data").write_text("1, 2, 0\n3,?,4\n")
    (tmp_path / "b.txt").write_text("5,6,1\n")
    there = read(str(tmp_path), columns=("p", "q", "num"), label="num", binarise=0.0)
    assert there.names == ("a", "b")
    assert there.class_names == ("0", "1")
    assert there.y.tolist() == [0, 1, 1]
    np.testing.assert_array_equal(there.x, [[1, 2], [3, np.nan], [5, 6]])


@pytest.mark.parametrize(
    ("labels", "keys", "expected"),
    [
        (["0", "1", "10", "9"], {}, (("0", "1", "9", "10"), [0, 1, 3, 2])),
        (["0.5", "1", "10", "9"], {}, ((), [0.5, 1, 10, 9])),
        (["0.0", "1", "10", "9"], {"task": "classification"}, (("0", "1", "9", "10"), [0, 1, 3, 2])),
        (["3", "1", "10", "9"], {"task": "regression"}, ((), [3, 1, 10, 9])),
        (["3", "1", "x", "9"], {}, (("1", "3", "9", "x"), [1, 0, 3, 2])),
        ([" a", "b ", "a", "b"], {}, (("a", "b"), [0, 1, 0, 1])),
    ],
)
def test_labels_are_of_one_kind_over_all_files(
    tmp_path: Path, labels: list[str], keys: dict[str, Any], expected: Any
) -> None:
    files = {
        name: f"v,label\n1,{first}\n2,{second}\n" for name, first, second in [("a", *labels[:2]), ("b", *labels[2:])]
    }
    there = read(folder(tmp_path, **files), **keys)
    assert (there.class_names, there.y.tolist()) == expected


def test_rows_of_whole_numbers_stay_whole(tmp_path: Path) -> None:
    assert read(folder(tmp_path, a="v,label\n1,0\n", b="v,label\n2,1\n")).x.dtype == np.int64
    assert read(folder(tmp_path, a="v,label\n1,0\n", b="v,label\n2.5,1\n")).x.dtype == np.float64


def test_missing_texts_are_a_setting(tmp_path: Path) -> None:
    path = folder(tmp_path, a="v,label\n-,0\n3,1\n")
    np.testing.assert_array_equal(read(path, missing=("-",)).x, [[np.nan], [3]])
    with pytest.raises(FedmetaError, match='is "-", not a number'):
        read(path)


def test_truth_values_are_numbers(tmp_path: Path) -> None:
    there = read(folder(tmp_path, a="v,w,label\nTrue,True,0\nFalse,,1\nTrue,False,1\n"))
    np.testing.assert_array_equal(there.x, [[1, 1], [0, np.nan], [1, 0]])


def test_min_rows_and_marks_of_order_and_blank_lines(tmp_path: Path) -> None:
    there = read(folder(tmp_path, north="\ufeff" + NORTH + "\n\n", south=SOUTH), min_rows=3)
    assert there.names == ("north",)
    assert there.sites.sizes.tolist() == [3]


def test_one_file_is_one_site(tmp_path: Path) -> None:
    path = folder(tmp_path, north=NORTH) + "/north.csv"
    assert read(path).names == ("north",)
    assert load_site(Data(), path, "hospital-a").names == ("hospital-a",)
    assert load_site(Data(min_rows=50), path).names == ("north",)


GOOD = "a,b,label\n1,2,0\n2,3,1\n"
WRONG: dict[str, tuple[dict[str, str], dict[str, Any], str]] = {
    "no label": (
        {"x": "a,b,lable\n1,2,0\n"},
        {},
        r'x\.csv: no label column "label".*a, b, lable; did you mean "lable"',
    ),
    "text": (
        {"x": "a,b,label\n1,2,0\n\n2,high,1\n3,3,1\n4,4,1\n"},
        {},
        r'x\.csv: line 4, column "b" is "high", not a number: correct it, or list it in data.missing',
    ),
    "text in quotes over lines": (
        {"x": '"a\nb",b,label\n1,2,0\n2,high,1\n3,3,1\n4,4,1\n'},
        {},
        r'line 4, column "b" is "high"',
    ),
    "categories": (
        {"x": "a,b,label\nmale,2,0\nfemale,3,1\n"},
        {},
        r'x\.csv: lines 2 and 3, column "a" is "male", "female", not a number: correct it',
    ),
    "infinite": ({"x": GOOD + "inf,1,1\n"}, {}, r'x\.csv: line 4, column "a" is inf, beyond what float32 holds'),
    "no cell of a label": ({"x": GOOD + "1,2,\n"}, {}, r'x\.csv: line 4, column "label" is missing'),
    "label no number": (
        {"x": GOOD + "1,2,yes\n"},
        {"task": "regression"},
        r'x\.csv: line 4, column "label" is "yes", but data.task = "regression" needs numbers',
    ),
    "column lacks": ({"x": "a,label\n1,0\n"}, {}, r"x\.csv lacks 'b': every file needs the columns of .*good\.csv"),
    "column besides": ({"x": "a,b,c,label\n1,2,3,0\n"}, {}, r"x\.csv has 'c' besides"),
    "column renamed": (
        {"x": "a,bb,label\n1,2,0\n"},
        {},
        r'x\.csv lacks \'b\' and has \'bb\' besides.*did you mean "bb"',
    ),
    "twice": ({"x": "a,b,a,label\n1,2,3,0\n"}, {}, r'x\.csv: columns 1 and 3 are both called "a"'),
    "index": ({"x": ",a,b,label\n0,1,2,0\n"}, {}, r"x\.csv: column 1 has no name \(was it written with an index\?\)"),
    "no separator": (
        {"x": "a b label\n1 2 0\n"},
        {},
        r"x\.csv: its first line is one cell, 'a b label': cells must have commas between them",
    ),
    "longer line": ({"x": GOOD + "1,2,3,4\n"}, {}, r"x\.csv: lines have different numbers of cells.*line 4, saw 4"),
    "shorter line": (
        {"x": GOOD + "1,2\n3,4,1\n"},
        {},
        r"x\.csv: .* expected 3 in line 4, saw 2, fewer than the header",
    ),
    "broken off": ({"x": GOOD + "1,2"}, {}, r"expected 3 in line 4, saw 2, .*is the file broken off"),
    "longer lines": ({"x": "a,b,label\n1,2,0,9\n1,2,0,9\n"}, {}, r"x\.csv: lines have different numbers of cells"),
    "empty": ({"x": ""}, {}, r"x\.csv: the file is empty"),
    "header only": ({"x": "a,b,label\n"}, {}, r"x\.csv: there are no rows"),
    "label only": ({"x": "label\n1\n"}, {}, r"x\.csv: there is no feature column beside the label"),
    "header where none is": ({"x": GOOD}, {"columns": ("a", "b", "label")}, r"first line names the columns"),
    "nothing in a column": (
        {"good": "a,b,label\n1,,0\n", "x": "a,b,label\n1,,0\n"},
        {},
        r'column "b" is missing \(NaN\) in every row of every site',
    ),
}


@pytest.mark.parametrize(("files", "keys", "message"), WRONG.values(), ids=WRONG)
def test_wrong_files(tmp_path: Path, files: dict[str, str], keys: dict[str, Any], message: str) -> None:
    with pytest.raises(FedmetaError, match=message) as error:
        read(folder(tmp_path, **({"good": GOOD} | files)), **keys)
    assert "\n" not in str(error.value)


def test_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(FedmetaError, match=r"has no file \*\.csv or \*\.parquet"):
        read(str(tmp_path))
    (tmp_path / "a.data").write_text("1,2,0\n")
    with pytest.raises(FedmetaError, match=r"a\.data has no header: name its columns in data\.columns"):
        read(str(tmp_path))
    with pytest.raises(FedmetaError, match="no such file or folder"):
        read(str(tmp_path / "absent"))
    pd.DataFrame({"v": [1], "label": [0]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(FedmetaError, match=r'x\.csv and x\.parquet would both be site "x"'):
        read(folder(tmp_path, x="v,label\n1,0\n"))


def test_wrong_encodings(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"a,label\n1,\xff\xfe\n")
    with pytest.raises(FedmetaError, match=r"x\.csv is not UTF-8 text"):
        read(str(tmp_path))
    (tmp_path / "x.csv").unlink()
    (tmp_path / "x.parquet").write_bytes(b"certainly no parquet")
    with pytest.raises(FedmetaError, match=r"x\.parquet is not a Parquet file"):
        read(str(tmp_path))


def test_wrong_cells_of_parquet(tmp_path: Path) -> None:
    frame = pd.DataFrame({"v": ["1", "2", "many"], "when": pd.to_datetime(["2020-01-01"] * 3), "label": [0, 1, 1]})
    frame[["v", "label"]].to_parquet(tmp_path / "x.parquet")
    with pytest.raises(FedmetaError, match=r'x\.parquet: row 3, column "v" is "many", not a number'):
        read(str(tmp_path))
    frame[["when", "label"]].to_parquet(tmp_path / "x.parquet")
    with pytest.raises(FedmetaError, match=r'row 1, column "when" is "2020-01-01.*encode the column as numbers.*days'):
        read(str(tmp_path))
    np.testing.assert_array_equal(read(str(tmp_path), dates="days").x, [[18262.0]] * 3)
