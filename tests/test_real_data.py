"""The main job on real input: from one TOML file to the JSON of the contract and per-site curves in MLflow."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fedmeta.tracking.mlflow_client import open_client

ROOT = Path(__file__).parents[1]
CURVES = 12
CASES = {
    "har": ("har.toml", "har/har.npz", 21, []),
    "heart": ("heart.toml", "heart/heart.npz", 4, []),
    "heart tables": ("heart_tables.toml", "heart/raw", 4, []),
    "writers": ("writers.toml", "qmnist_writers/qmnist_writers.npz", 584, ["server.sites_per_round=8"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_ends_with_the_json_of_the_contract_and_every_site_in_mlflow(
    case: str, shared_data: Path, tmp_path: Path
) -> None:
    file, data, sites, more = CASES[case]
    settings = [f"data.path={shared_data / data}", "server.rounds=2", f"tracking.site_curves={CURVES}", *more]
    words = [word for setting in settings for word in ("--set", setting)]
    done = subprocess.run(
        [sys.executable, "-m", "fedmeta", "run", str(ROOT / "experiments" / file), "--json", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    check_summary(summary, sites)
    client = open_client(f"sqlite:///{tmp_path / 'mlflow.db'}")
    metrics = client.get_run(summary["run_id"]).data.metrics
    for prefix in ("personalized_accuracy/", "global_accuracy/"):
        assert sum(key.startswith(prefix) for key in metrics) == min(sites, CURVES)
    history = client.get_metric_history(summary["run_id"], "new_sites/personalized_accuracy_mean")
    assert [point.step for point in history] == [0, 2]
    folder = Path(client.download_artifacts(summary["run_id"], "", str(tmp_path)))
    assert len(json.loads((folder / "per_site.json").read_text())["data"]) == sites
    frame = pd.read_parquet(folder / "sites.parquet")
    assert frame[frame["round"] == 2]["site"].nunique() == sites


def check_summary(summary: dict[str, Any], sites: int) -> None:
    assert summary["rounds"] == 2
    assert summary["learner"] == "maml"
    assert summary["new_sites"]["n"] + summary["training_sites"]["n"] == sites
    for group in ("new_sites", "training_sites"):
        for state in ("global", "personalized"):
            scores = summary[group][state]
            assert 0 <= scores["min"] <= scores["worst_decile"] <= scores["mean"] <= 1
            assert scores["std"] >= 0
            assert scores["loss"] > 0
        assert 0 <= summary[group]["helped"] <= 1
    assert Path(summary["checkpoint"]).is_file()
    assert {"run_id", "seed", "wall_s", "bytes_down", "bytes_up"} <= set(summary)
