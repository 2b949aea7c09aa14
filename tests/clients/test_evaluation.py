"""What a node makes of the scores that the engines compute."""

from pathlib import Path

import numpy as np
import pytest

from fedmeta import load_experiment, run
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["loop", "vmap", "lowrank"])
def test_accuracies_are_counts_of_right_rows(tmp_path: Path, engine: str) -> None:
    draw = np.random.default_rng(0)
    site = np.repeat(np.arange(60), np.arange(2, 62))
    x = draw.normal(size=(len(site), 4))
    np.savez(tmp_path / "sites.npz", x=x, y=(x @ draw.normal(size=(4, 3))).argmax(1), site=site)
    (tmp_path / "e.toml").write_text(
        f'[data]\nsource = "npz"\npath = "{tmp_path}/sites.npz"\n[model]\nname = "logistic"\n[server]\nrounds = 0\n'
        f'[tracking]\nuri = "none"\nfolder = "{tmp_path}/runs"\n[runtime]\nengine = "{engine}"\n'
    )
    sites = run(load_experiment(tmp_path / "e.toml")).sites
    for when in ("global", "personalized"):
        accuracy = sites[f"{when}_accuracy"].to_numpy()
        rows = sites["test_rows"].to_numpy()
        assert np.array_equal(accuracy, np.rint(accuracy * rows) / rows)
        assert accuracy.max() <= 1


def test_a_federation_of_one_class_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    site = np.repeat(np.arange(8), 10)
    np.savez(tmp_path / "sites.npz", x=np.random.default_rng(0).normal(size=(80, 4)), y=np.zeros(80, int), site=site)
    settings = [f"data.path={tmp_path}/sites.npz", f"tracking.folder={tmp_path}/runs", "tracking.uri=none"]
    experiment = Experiment.from_toml("", overrides=["data.source=npz", *settings])
    with pytest.raises(FedmetaError, match="nothing to learn"):
        run(experiment)
