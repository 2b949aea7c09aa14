"""A site's own file: the same rows whatever the order of its columns, and in whichever form."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedmeta.data import load, load_site
from fedmeta.experiment import Data

ROWS = {"chol": [200.0, 180.0, 220.0], "age": [61, 47, 55], "label": ["yes", "no", "yes"], "pressure": [1.5, 2.5, 3.5]}
DATA = Data(source="tables", path="sites")


def write(folder: Path, form: str, order: list[str]) -> Path:
    frame = pd.DataFrame(ROWS)[order]
    path = folder / f"hospital.{form}"
    if form == "csv":
        frame.to_csv(path, index=False)
    elif form == "parquet":
        frame.to_parquet(path, index=False)
    else:
        features = frame.drop(columns="label")
        np.savez(path, x=features.to_numpy(), y=frame["label"].to_numpy(str), feature_names=[*features.columns])
    return path


@pytest.mark.parametrize("form", ["csv", "parquet", "npz"])
@pytest.mark.parametrize("order", [["age", "chol", "label", "pressure"], ["label", "pressure", "chol", "age"]])
def test_columns_come_by_name(tmp_path: Path, form: str, order: list[str]) -> None:
    population = load_site(DATA, str(write(tmp_path, form, order)), "a")
    assert population.feature_names == ("age", "chol", "pressure")
    np.testing.assert_array_equal(population.x, np.array([[61, 200, 1.5], [47, 180, 2.5], [55, 220, 3.5]]))
    assert population.names == ("a",)
    assert population.class_names == ("no", "yes")


def test_listed_columns_keep_the_lists_order(tmp_path: Path) -> None:
    (tmp_path / "a.data").write_text("200,61,yes\n180,47,no\n")
    data = Data(source="tables", path="sites", columns=("chol", "age", "label"))
    assert load_site(data, str(tmp_path / "a.data"), "a").feature_names == ("chol", "age")


def test_a_site_alone_holds_the_rows_that_it_has_in_the_folder(tmp_path: Path) -> None:
    write(tmp_path, "csv", ["label", "pressure", "chol", "age"]).rename(tmp_path / "b.csv")
    write(tmp_path, "csv", ["pressure", "age", "chol", "label"]).rename(tmp_path / "a.csv")
    together = load(DATA.model_copy(update={"path": str(tmp_path)}))
    alone = load_site(DATA, str(tmp_path / "b.csv"), "b")
    assert together.feature_names == alone.feature_names
    np.testing.assert_array_equal(together.x[together.sites.of(1)], alone.x)
