"""The tables and pictures of a run, in its folder and on their way to MLflow."""

import logging
from pathlib import Path

import pandas as pd

from fedmeta.tracking import run_page
from fedmeta.tracking.entries import Artifact, Entry, Picture, Table
from fedmeta.tracking.experiment_page import PICTURE


def tables(sites: pd.DataFrame, folder: Path) -> list[Entry]:
    """Writes a run's tables into its folder, the results for MLflow to show and every evaluation to be read."""
    results, history = folder / "per_site.json", folder / "sites.parquet"
    run_page.per_site(sites).to_json(results, orient="split", index=False)
    sites.to_parquet(history, index=False)
    return [Table(str(results.absolute())), artifact(history)]


def drawings(sites: pd.DataFrame, folder: Path) -> list[Entry]:
    """Draws a run's pictures into its folder; the sites before and after adapting also go among MLflow's charts."""
    quiet_matplotlib()
    from fedmeta.tracking import pictures

    last = int(sites["round"].max())
    charts = [path for path in pictures.save(sites, folder / "pictures") if path.stem == "sites"]
    return [*(Picture(str(path.absolute()), PICTURE, last) for path in charts), artifact(folder / "pictures")]


def quiet_matplotlib() -> None:
    """Keeps Matplotlib from announcing, on a fresh machine, that it looks for fonts; goes before its import."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)


def artifact(path: Path) -> Artifact:
    """Returns what sends a file to the root of the artifacts, or a folder under its own name."""
    return Artifact(str(path.absolute()), path.name if path.is_dir() else "")
