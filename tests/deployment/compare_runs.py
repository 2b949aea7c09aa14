"""Compares a deployed run with the local one: compare_runs.py SUMMARY.json LOCAL_SUMMARY.json STORE SITE..."""

import json
import sys
from pathlib import Path

import torch
from mlflow import MlflowClient

from fedmeta import checkpoint


def main(deployed: Path, local: Path, store: str, *sites: str) -> None:
    summaries = [json.loads(path.read_text()) for path in (deployed, local)]
    assert summaries[0]["run_id"] != summaries[1]["run_id"], "one run, and not two"
    assert summaries[0]["rounds"] == summaries[1]["rounds"] > 0
    assert summaries[0]["bytes_up"] > 0
    states = [checkpoint.newest(Path(summary["checkpoint"]).parent)[0].meta_state for summary in summaries]
    assert states[0].keys() == states[1].keys(), "other keys"
    worst = max(float((states[0][name] - value).abs().max()) for name, value in states[1].items())
    print(f"largest difference of the meta-states: {worst:.1e}")
    assert worst <= 1e-5
    assert any(torch.count_nonzero(value) for name, value in states[0].items() if name.startswith("theta."))
    metrics = MlflowClient(store).get_run(summaries[0]["run_id"]).data.metrics
    for site in sites:
        name = f"personalized_accuracy/{site}"
        assert name in metrics, f"MLflow lacks {name}"
        print(f"{name} = {metrics[name]:.3f}")
    for group in ("new_sites", "training_sites"):
        here, there = (summary[group]["personalized"]["mean"] for summary in summaries)
        assert abs(here - there) < 1e-6, f"{group}: {here} deployed, {there} local"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
