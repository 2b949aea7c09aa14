"""Tables as people have them: read right, or refused with everything that is wrong at once."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedmeta.data import ArrayPopulation, load, load_site
from fedmeta.data.findings import findings
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Data

PLAIN = "age,bp,label\n61,120.5,yes\n54,131,no\n70,99.25,yes\n"
X = [[61, 120.5], [54, 131], [70, 99.25]]


def read(folder: Path, **keys: Any) -> ArrayPopulation:
    population = load(Data(source="tables", path=str(folder), **keys))
    assert isinstance(population, ArrayPopulation)
    return population


def refusal(folder: Path, **keys: Any) -> str:
    with pytest.raises(FedmetaError) as error:
        read(folder, **keys)
    assert "\n" not in str(error.value)
    return str(error.value)


FORMS = {
    "semicolons and decimal commas": PLAIN.replace(",", ";").replace(".", ",").encode(),
    "semicolons and points": PLAIN.replace(",", ";").encode(),
    "tabs": PLAIN.replace(",", "\t").encode(),
    "a mark of byte order": b"\xef\xbb\xbf" + PLAIN.encode(),
    "UTF-16 of Excel": PLAIN.replace(",", "\t").encode("utf-16"),
    "Excel's separator line": b"sep=;\r\n" + PLAIN.replace(",", ";").replace("\n", "\r\n").encode(),
    "comments": b"# exported on Monday\n" + PLAIN.encode() + b"# end of file\n",
    "blank and empty lines": PLAIN.replace("54", "\n54").encode() + b"\n,,\n",
    "spaces": PLAIN.replace(",", " , ").encode(),
    "quotes": b'"age","bp","label"\n"61","120.5","yes"\n"54","131","no"\n"70","99.25","yes"\n',
}


@pytest.mark.parametrize("content", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("packed", [False, True])
def test_forms_of_text_are_read_alike(tmp_path: Path, content: bytes, packed: bool) -> None:
    (tmp_path / "a.csv").write_text(PLAIN)
    if packed:
        (tmp_path / "b.csv.gz").write_bytes(gzip.compress(content))
    else:
        (tmp_path / "b.csv").write_bytes(content)
    there = read(tmp_path)
    assert there.names == ("a", "b")
    np.testing.assert_array_equal(there.x, [*X, *X])
    assert there.class_names == ("no", "yes")


def test_a_mixed_folder_is_read_and_what_is_left_out_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(PLAIN)
    (tmp_path / "b.tsv").write_text(PLAIN.replace(",", "\t"))
    pd.DataFrame({"age": [61], "bp": [120.5], "label": ["yes"]}).to_parquet(tmp_path / "c.pq")
    (tmp_path / "sheet.xlsx").write_bytes(b"PK\x03\x04xx")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "old").mkdir()
    there = read(tmp_path)
    assert there.names == ("a", "b", "c")
    note = " ".join(there.notes)
    for name in ("sheet.xlsx", "notes.txt", "old/"):
        assert name in note
    assert "saved as CSV" in note


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["1,234,567", "7"], [1234567, 7]),
        (["1,234.5", "2,000.25"], [1234.5, 2000.25]),
        (["1'234'567", "2'000"], [1234567, 2000]),
        (["1\u00a0234", "2\u202f000.5"], [1234, 2000.5]),
        (["1.234.567", "7"], [1234567, 7]),
        (["1.234,5", "2.000,25"], [1234.5, 2000.25]),
    ],
)
def test_certain_thousands_are_read(tmp_path: Path, cells: list[str], values: list[float]) -> None:
    (tmp_path / "a.csv").write_text("v,label\n" + "".join(f'"{cell}",{row}\n' for row, cell in enumerate(cells)))
    there = read(tmp_path)
    np.testing.assert_array_equal(there.x[:, 0], values)
    assert "thousands" in " ".join(there.notes)


def test_uncertain_thousands_are_refused_with_the_cure(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('v,w,label\n"42,850",1.5,0\n"1,544",2.5,1\n')
    message = refusal(tmp_path)
    assert 'a.csv: line 2, column "v" is "42,850"' in message
    assert "remove thousands separators" in message


def test_decimal_commas_hold_for_labels_too(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("v;label\n1,5;0,25\n2,5;1,75\n")
    there = read(tmp_path)
    assert there.regression
    np.testing.assert_array_equal(there.y, [0.25, 1.75])


def test_decimal_commas_in_quotes_and_points_beside_decimal_commas(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('v,w,label\n"4,76",1.5,0\n"5,1",2.5,1\n5,3.5,1\n')
    np.testing.assert_array_equal(read(tmp_path).x, [[4.76, 1.5], [5.1, 2.5], [5, 3.5]])
    (tmp_path / "a.csv").write_text("v;w;label\n4,76;1.544;0\n5,1;361;1\n5;2.111;1\n")
    there = read(tmp_path)
    np.testing.assert_array_equal(there.x, [[4.76, 1544], [5.1, 361], [5, 2111]])
    assert "points between thousands in w" in " ".join(there.notes)
    assert there.class_names == ("0", "1")


def test_numbers_with_units_are_no_categories(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("v,label\n" + "".join(f"{n % 20 + 100} mmHg,{n % 2}\n" for n in range(80)))
    assert 'line 2, column "v" is "100 mmHg", a number with a unit or a sign: write the numbers alone' in refusal(
        tmp_path
    )
    (tmp_path / "a.csv").write_text(
        "v,label\n" + "".join(f"{40 + n % 3 * 10}-{50 + n % 3 * 10},{n % 2}\n" for n in range(80))
    )
    assert read(tmp_path).categories == (("v", ("40-50", "50-60", "60-70")),)


def test_everything_that_is_wrong_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("age,bp,label\n61,high,yes\n54,131,\n1,2,no\n2,low,no\n3,4,no\n")
    (tmp_path / "b.csv").write_text("age,bp,label\n61,120\n54,131,no\n3,4\n1,1,yes\n")
    (tmp_path / "c.csv").write_text("age,label\n61,yes\n")
    (tmp_path / "d.csv").write_bytes(b"age,bp,label\n1,2,yes\n3,\xe4,no\n")
    (tmp_path / "e.csv").write_text("age,bp,label\n1,2,yes\n2,3,no\n")
    (tmp_path / "f.xlsx.csv").write_bytes(b"PK\x03\x04xx")
    message = refusal(tmp_path)
    for part in (
        'a.csv: lines 2 and 5, column "bp" is "high", "low"',
        'a.csv: line 3, column "label" is missing',
        "b.csv: lines have different numbers of cells: expected 3 in lines 2 and 4, saw 2",
        "c.csv lacks 'bp'",
        "d.csv is not UTF-8 text",
        'at byte 23, in line 3: 0xe4, in Latin-1 "ä"',
        "f.xlsx.csv is a zip archive",
    ):
        assert part in message
    assert message.startswith("6 problems: (1) ")


def test_the_byte_named_is_the_byte(tmp_path: Path) -> None:
    content = PLAIN.encode() + b"60,100,no\n" * 50_000
    (tmp_path / "a.csv").write_bytes(content + b"60,100,gr\xfcn\n")
    assert f"at byte {len(content) + 9}, in line 50005" in refusal(tmp_path)


def test_one_file_with_a_column_of_sites(tmp_path: Path) -> None:
    text = "hospital,age,label\n2,61,yes\n1,54,no\n2,40,no\n1,33,yes\n"
    (tmp_path / "all.csv").write_text(text)
    there = read(tmp_path / "all.csv", site_column="hospital")
    assert there.names == ("1", "2")
    assert there.feature_names == ("age",)
    assert [there.x[there.sites.of(site), 0].tolist() for site in range(2)] == [[54, 33], [61, 40]]
    assert read(tmp_path, site_column="hospital").names == ("1", "2")
    alone = read(tmp_path / "all.csv")
    assert len(alone) == 1
    assert "is one site, and there is nothing to learn across sites" in alone.notes[0]
    assert 'data.site_column = "hospital"' in alone.notes[0]
    assert 'no column "hopital" (data.site_column)' in refusal(tmp_path, site_column="hopital")
    (tmp_path / "all.csv").write_text(text + ",1,no\n")
    assert 'line 6, column "hospital" is missing: every row needs its site' in refusal(tmp_path, site_column="hospital")
    with pytest.raises(FedmetaError, match="names 2 sites, but a site's own file"):
        load_site(Data(site_column="hospital"), str(tmp_path / "all.csv"))


def test_features_and_ignore(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,age,bp,label\nx1,61,120,yes\nx2,54,131,no\n")
    (tmp_path / "b.csv").write_text("age,bp,extra,label\n61,120,1,yes\n54,131,2,no\n")
    assert read(tmp_path, features=("age", "bp")).feature_names == ("age", "bp")
    there = read(tmp_path, ignore=("id", "extra"))
    assert there.feature_names == ("age", "bp")
    assert "left out extra, id: data.ignore" in there.notes
    assert 'data.ignore: no file has a column "idd"; did you mean "id"?' in refusal(tmp_path, ignore=("idd", "extra"))
    alone = load_site(Data(ignore=("id", "extra")), str(tmp_path / "b.csv"))
    assert alone.feature_names == ("age", "bp"), "one site may lack what others leave out"
    assert "data.features names it" in refusal(tmp_path, features=("age", "extra"))


def test_text_is_a_category_and_its_names_are_those_of_all_files(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("age,sex,label\n61,F,yes\n54,M,no\n,,yes\n")
    (tmp_path / "b.csv").write_text("age,sex,label\n61,X,yes\n54,F ,no\n")
    there = read(tmp_path)
    assert there.categories == (("sex", ("F", "M", "X")),)
    np.testing.assert_array_equal(there.x[:, 1], [0, 1, np.nan, 2, 0])
    assert 'column "sex" is text: 3 categories, F, M, X' in there.notes


def test_categories_of_numbers_are_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("ward,label\n01,yes\n1,no\n1.0,yes\n2,no\n")
    there = read(tmp_path, categorical=("ward",))
    assert there.categories == (("ward", ("01", "1", "2")),)
    np.testing.assert_array_equal(there.x[:, 0], [0, 1, 1, 2])
    assert 'data.categorical: no file has a column "wart"' in refusal(tmp_path, categorical=("wart",))


def test_a_different_text_in_every_row_is_no_category(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("name,v,label\n" + "".join(f"patient {n},{n},{n % 2}\n" for n in range(60)))
    message = refusal(tmp_path)
    assert "60 different texts in 60 rows are no categories (an id?): leave the column out with data.ignore" in message


@pytest.mark.parametrize("form", ["2024-03-09", "2024-03-09 00:00", "9.3.2024", "9/3/2024"])
def test_dates_are_refused_or_days(tmp_path: Path, form: str) -> None:
    other = {"9.3.2024": "31.12.1999", "9/3/2024": "31/12/1999"}.get(form, "1999-12-31")
    (tmp_path / "a.csv").write_text(f"when,label\n{form},yes\n{other},no\n,no\n")
    message = refusal(tmp_path)
    assert "the column holds dates" in message
    assert 'data.dates = "days"' in message
    np.testing.assert_array_equal(read(tmp_path, dates="days").x[:, 0], [19791, 10956, np.nan])


def test_days_or_months_first_is_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("when,label\n9/3/2024,yes\n10/4/2024,no\n")
    assert "write it as 2024-03-09" in refusal(tmp_path, dates="days")


@pytest.mark.parametrize(
    ("files", "classes"),
    [
        (["1\n0\n", "1.0\n0.0\n"], ("0", "1")),
        (["1\n0\n", "1.0\nunknown\n"], ("0", "1", "unknown")),
        (["01\n1\n", "1\n01\n"], ("01", "1")),
        (["yes\n no\n", "yes \nno\n"], ("no", "yes")),
        (["0.0\n1.0\n", "1.0\n0.0\n"], ("0", "1")),
        (["True\nFalse\n", "False\nTrue\n"], ("False", "True")),
        (["0.0\n1.0\n", "2.0\n3.0\n"], ()),
        (["0.5\n1\n", "2\n3\n"], ()),
    ],
)
def test_labels_follow_one_rule(tmp_path: Path, files: list[str], classes: tuple[str, ...]) -> None:
    for number, labels in enumerate(files):
        rows = "".join(f"{row},{label}\n" for row, label in enumerate(labels.splitlines()))
        (tmp_path / f"h{number}.csv").write_text("v,label\n" + rows)
    assert read(tmp_path).class_names == classes


def test_labels_that_are_dates_or_lists_are_refused(tmp_path: Path) -> None:
    frame = pd.DataFrame({"v": [1.0, 2.0], "label": pd.to_datetime(["2024-01-01", "2024-01-02"])})
    frame.to_parquet(tmp_path / "a.parquet")
    assert "a date, and no label" in refusal(tmp_path)
    frame.assign(label=[[1], [2]]).to_parquet(tmp_path / "a.parquet")
    assert "a list, and no label" in refusal(tmp_path)
    (tmp_path / "a.parquet").unlink()
    (tmp_path / "a.csv").write_text("v,label\n1,2024-01-01\n2,2024-01-02\n")
    assert "a date, and no label" in refusal(tmp_path)


def test_accents_composed_and_decomposed_are_one_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\u00e2ge,label\n1,0\n2,1\n")
    (tmp_path / "b.csv").write_text("a\u0302ge,label\n1,0\n2,1\n")
    assert read(tmp_path).feature_names == ("\u00e2ge",)


def sites(folder: Path, **columns: Any) -> list[str]:
    """Writes four sites of forty rows, a column changed at the last; returns what is found."""
    draw = np.random.default_rng(3)
    for number in range(4):
        frame = pd.DataFrame({"bp": np.round(draw.normal(120, 15, 40), 1), "age": draw.integers(20, 90, 40)})
        frame["label"] = draw.integers(0, 2, 40)
        for name, change in columns.items():
            frame[name] = change(frame, number, draw)
        frame.to_csv(folder / f"h{number}.csv", index=False)
    there = read(folder)
    return [*there.notes, *findings(there, Data(source="tables", path=str(folder)))]


FOUND = {
    "other units": ({"bp": lambda f, n, d: f["bp"] / 7.5 if n == 3 else f["bp"]}, 'site h3: column "bp" has median'),
    "thousands": (
        {"plt": lambda f, n, d: [f"{v:.3f}" if n == 3 and v >= 1 else f"{v * 1000:.0f}" for v in _thousands(d)]},
        'site h3: column "plt" has whole numbers below 1000 beside numbers with exactly three decimals',
    ),
    "an id": ({"pid": lambda f, n, d: 7_000_000 + 1000 * n + np.arange(40) * 3}, 'column "pid" looks like an id'),
    "row numbers": ({"Unnamed: 0": lambda f, n, d: np.arange(40)}, 'column "Unnamed: 0" looks like an id'),
    "a constant": ({"year": lambda f, n, d: 2024}, 'column "year" is constant (2024)'),
    "a copy of the label": ({"icd": lambda f, n, d: f["label"] + 5}, 'column "icd" gives the class away'),
    "its rank": (
        {"score": lambda f, n, d: f["label"] + d.random(40) * 0.9},
        'column "score" alone separates the two classes',
    ),
    "a number for missing": (
        {"bp": lambda f, n, d: f["bp"].where(np.arange(40) % 10 > 0, -9)},
        'column "bp": -9 in 16 rows, while all others',
    ),
    "few whole numbers": (
        {"asa": lambda f, n, d: d.integers(1, 5, 40)},
        'column "asa" has 4 different whole numbers, 1, 2, 3, 4',
    ),
    "other class names": (
        {"label": lambda f, n, d: f["label"].astype(bool) if n == 3 else f["label"]},
        'site h3 shares no class with the others: it has "False", "True", they have "0", "1"',
    ),
    "class names by case": (
        {"label": lambda f, n, d: np.where(f["label"] == 1, "Yes" if n == 3 else "yes", "no")},
        '"Yes", "yes" differ by case or spaces alone',
    ),
    "unlabelled rows": ({"label": lambda f, n, d: f["label"].where(f["bp"] > 110, -1)}, 'looks like "unlabelled"'),
    "255": ({"label": lambda f, n, d: f["label"].where(f["bp"] > 110, 255)}, 'looks like "unlabelled"'),
    "other categories": (
        {"sex": lambda f, n, d: d.choice(["1", "2"] if n == 3 else ["F", "M"], 40)},
        'site h3 shares no category of column "sex" with the others',
    ),
    "categories by case": (
        {"sex": lambda f, n, d: d.choice(["f", "m"] if n == 3 else ["F", "m"], 40)},
        'column "sex": "F", "f" differ by case or spaces alone',
    ),
    "numbers as classes": (
        {"label": lambda f, n, d: d.integers(0, 60, 40)},
        "different whole numbers, read as classes",
    ),
}


def _thousands(draw: np.random.Generator) -> list[float]:
    return [float(value) for value in np.round(draw.uniform(0.2, 3.0, 40), 3)]


@pytest.mark.parametrize(("columns", "message"), FOUND.values(), ids=FOUND)
def test_what_is_probably_not_meant_is_found(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    found = sites(tmp_path, **columns)
    assert any(message in each for each in found), found


def test_nothing_is_found_in_clean_sites(tmp_path: Path) -> None:
    assert sites(tmp_path) == []
