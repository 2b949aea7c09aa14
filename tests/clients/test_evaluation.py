"""What a node makes of the scores that the engines compute."""

from pathlib import Path

import numpy as np
import pytest

from fedmeta import load_experiment, run


@pytest.mark.parametrize("engine", ["loop", "vmap", "lowrank"])
@pytest.mark.parametrize("classes", [1, 3])
def test_accuracies_are_counts_of_right_rows(tmp_path: Path, engine: str, classes: int) -> None:
    draw = np.random.default_rng(0)
    site = np.repeat(np.arange(60), np.arange(2, 62))
    x = draw.normal(size=(len(site), 4))
    np.savez(tmp_path / "sites.npz", x=x, y=(x @ draw.normal(size=(4, classes))).argmax(1), site=site)
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
        assert classes > 1 or accuracy.min() == 1
