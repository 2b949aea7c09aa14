"""`flwr run .` from the repository root, as Flower's own users would type it."""

import subprocess
from pathlib import Path

import pytest

from fedmeta.checkpoint import newest
from fedmeta.launch import RESULT_VARIABLE
from fedmeta.runtime.superlink import environment, superlink, write_run_config
from tests.runtime.processes import wait_until

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
def test_flwr_run_works_from_the_repository_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(RESULT_VARIABLE, raising=False)
    # The app's working directory is the SuperLink's.
    monkeypatch.chdir(tmp_path)
    toml = '[model]\nhidden = "8"\n[server]\nrounds = 2\n[tracking]\nuri = "none"\nfolder = "runs"\n'
    config = write_run_config(tmp_path / "run.toml", toml)
    env, log = environment(tmp_path / "flwr", {"RAY_USAGE_STATS_ENABLED": "0"}), tmp_path / "log"
    command = ["flwr", "run", ".", "--stream", "--run-config", str(config), "--federation-config", "num-supernodes=2"]
    with superlink(tmp_path / "flwr", env, log):
        flwr = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)
        assert flwr.returncode == 0, flwr.stdout + flwr.stderr
        assert "Successfully started run" in flwr.stdout
        assert wait_until(lambda: any((tmp_path / "runs").glob("*/round-000002.safetensors"))), flwr.stdout[-5000:]
    (folder,) = (tmp_path / "runs").iterdir()
    saved, _ = newest(folder)
    assert saved.finished
    assert saved.round_number == 2
    assert len(saved.names) == 40
