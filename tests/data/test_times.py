"""Rows in time: by a column, by an array, as they come; and later rows as test rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmeta.data import ArrayPopulation, load, load_site, split
from fedmeta.errors import FedmetaError
from fedmeta.experiment import ROW_ORDER, Data, Experiment
from tests.data.made import npz, population

WRITTEN = {
    "numbers": ["3", "1.5", "2"],
    "dates": ["2024-03-11", "2023-12-24", "2024-01-02"],
    "dates with a time": ["2024-03-09 08:00", "2024-03-09T07:59", "2024-03-09 07:59:30"],
    "days before months": ["11.3.2024", "24.12.2023", "2.1.2024"],
}


def table(folder: Path, times: list[str], site: str = "north") -> str:
    rows = [f"{when},{place},{place % 2}" for place, when in enumerate(times)]
    (folder / f"{site}.csv").write_text("\n".join(["visit,a,label", *rows]) + "\n")
    return str(folder)


def read(path: str, source: Any = "tables", **keys: Any) -> ArrayPopulation:
    found = load(Data(source=source, path=path, **keys))
    assert isinstance(found, ArrayPopulation)
    return found


@pytest.mark.parametrize("times", WRITTEN.values(), ids=WRITTEN)
def test_a_column_orders_rows_and_is_no_feature(tmp_path: Path, times: list[str]) -> None:
    there = read(table(tmp_path, times), time="visit")
    assert there.feature_names == ("a",)
    assert there.x[there.sites.of(0), 0].tolist() == [1, 2, 0]
    assert there.in_time


def test_a_column_orders_the_rows_of_each_site_of_one_file(tmp_path: Path) -> None:
    (tmp_path / "all.csv").write_text("site,day,a,label\nb,2,0,0\na,9,1,1\nb,1,2,1\na,3,3,0\n")
    there = read(str(tmp_path / "all.csv"), time="day", site_column="site")
    assert [there.x[there.sites.of(site), 0].tolist() for site in range(2)] == [[3, 1], [2, 0]]
    # The same rows as a deployed node's own file.
    alone = load_site(Data(time="visit"), table(tmp_path, WRITTEN["numbers"], "own") + "/own.csv")
    assert isinstance(alone, ArrayPopulation)
    assert alone.x[alone.sites.of(0), 0].tolist() == [1, 2, 0]


def test_an_array_of_any_name_orders_rows(tmp_path: Path) -> None:
    path = npz(tmp_path, visit=np.arange(12)[::-1], time=np.arange(12))
    assert read(path, "npz", time="visit").sites.of(0).tolist() == [3, 2, 1, 0]
    assert read(path, "npz").sites.of(0).tolist() == [0, 1, 2, 3]
    backwards = npz(tmp_path, time=np.arange(12)[::-1])
    assert read(backwards, "npz", time=ROW_ORDER).sites.of(0).tolist() == [0, 1, 2, 3]
    assert read(backwards, "npz", time=ROW_ORDER).in_time
    assert read(backwards, "npz").in_time
    assert read(backwards, "npz", time="time", without=["site-05"]).sites.of(0).tolist() == [2, 1, 0]


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=6), test=st.floats(0.05, 0.95))
def test_the_latest_rows_test(sizes: list[int], test: float) -> None:
    there = population(sizes)  # feature 0 is the row's place in time
    object.__setattr__(there, "in_time", True)
    rows = split(there, Data(split="time", test=test), 0)
    for site in range(len(sizes)):
        train, late = (found(there.all_sites).of(site) for found in (rows.train_rows, rows.test_rows))
        assert not len(late) or there.x[train, 0].max() < there.x[late, 0].min()
        assert sorted([*train, *late]) == sorted(there.sites.of(site))


REFUSED: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "a cell that is no time": (["1", "soon", "2"], {"time": "visit"}, r'line 3, column "visit" is "soon", neither'),
    "no such date": (
        ["2024-03-11", "2024-02-30", "2024-01-02"],
        {"time": "visit"},
        r'line 3, column "visit" is "2024-02-30", neither a number nor a date: write it as 2024-03-09',
    ),
    "a cell is missing": (["1", "", "2"], {"time": "visit"}, r'line 3, column "visit" is missing: every row needs its'),
    "no such column": (["1", "2", "3"], {"time": "visits"}, r'no column "visits" \(data.time\).*did you mean "visit"'),
    "no order is known": (
        ["1", "2", "3"],
        {"split": "time"},
        r'split = "time": the order of rows in time is not known',
    ),
}


@pytest.mark.parametrize(("times", "keys", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_order_in_time_is_refused(
    tmp_path: Path, times: list[str], keys: dict[str, Any], message: str
) -> None:
    path = table(tmp_path, times)
    with pytest.raises(FedmetaError, match=message) as error:
        split(read(path, **keys), Data(**keys), 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "keys", [{"time": "label"}, {"time": "ward", "site_column": "ward"}, {"split": "time", "ways": 2}]
)
def test_keys_that_do_not_go_together(keys: dict[str, Any]) -> None:
    given = [f"data.{key}={value}" for key, value in keys.items()]
    with pytest.raises(FedmetaError, match=f"data] {next(iter(keys))} = .*must"):
        Experiment().with_overrides(given)
