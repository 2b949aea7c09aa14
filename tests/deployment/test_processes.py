"""A run over a federation of real processes: the same numbers as in one process, over TLS and with node keys."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

import fedmeta
from fedmeta.certs import revoke
from fedmeta.errors import FedmetaError
from fedmeta.runtime import deployment
from fedmeta.runtime.superlink import keep
from tests.deployment.processes import INTRUDER, Federation, federation, write_sites
from tests.deployment.proxies import HERE, NGINX

EXPERIMENT = """
[data]
source = "tables"
path = "{data}"
new_sites = 1
support = 6
query = 6

[model]
name = "mlp"
hidden = "8"

[learner]
name = "maml"
inner_steps = 2

[server]
rounds = 2
sites_per_round = 0
wait_for = {sites}
round_timeout = 60.0

[evaluation]
every = 0

[runtime]
engine = "vmap"

[tracking]
uri = "sqlite:///{store}"
folder = "{folder}"
"""


@pytest.mark.slow
def test_a_deployed_run_is_the_local_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_sites(tmp_path / "data")
    names = str([*files]).replace("'", '"')

    def experiment(folder: str) -> fedmeta.Experiment:
        text = EXPERIMENT.format(
            data=tmp_path / "data", sites=names, store=tmp_path / "mlflow.db", folder=tmp_path / folder
        )
        (tmp_path / f"{folder}.toml").write_text(text)
        return fedmeta.load_experiment(tmp_path / f"{folder}.toml")

    local = fedmeta.run(experiment("local"))
    with federation(tmp_path, files) as running, outsiders(running, files["site-0"], tmp_path) as unregistered:
        deployed = fedmeta.run(experiment("deployed"), runtime="deployment")
        for log, process in unregistered.items():
            assert process.wait(30) != 0
            assert "SuperNode ID" not in log.read_text()
        with monkeypatch.context() as outside:
            outside.setenv(deployment.SUPERLINK, f"{HERE}:{running.gate}")
            with pytest.raises(FedmetaError, match="did not take the run"):
                fedmeta.run(experiment("outside"), runtime="deployment")
        a_revoked_site_is_out(running, tmp_path)

    assert deployed.meta_state.keys() == local.meta_state.keys()
    for name, value in local.meta_state.items():
        torch.testing.assert_close(deployed.meta_state[name], value, rtol=0, atol=1e-5)
    columns = ["site", "kind", "global_accuracy", "personalized_accuracy"]
    assert deployed.sites[columns].equals(local.sites[columns])
    assert deployed.summary["rounds"] == 2
    assert Path(deployed.summary["checkpoint"]).is_file()


def a_revoked_site_is_out(running: Federation, work: Path) -> None:
    """Unregisters a node's key and takes another site's certificate back; both nodes end at their next message."""
    assert [node.poll() for node in running.nodes.values()] == [None] * 3, "every node is still there"
    found = re.search(r"SuperNode ID: (\d+)", (work / "site-1.log").read_text())
    assert found
    command = [sys.executable, "-m", "fedmeta", "flower", "supernode", "unregister", found[1]]
    subprocess.run(command, check=True, timeout=120)
    running.nodes["site-1"].wait(60)
    if NGINX:
        revoke(running.certs, ["site-2"])
        running.nodes["site-2"].wait(60)
    assert running.nodes["site-0"].poll() is None


@contextmanager
def outsiders(running: Federation, file: Path, work: Path) -> Iterator[dict[Path, subprocess.Popen[bytes]]]:
    """Starts SuperNodes that must not get in: with a key that is not registered, with none, and in plain text."""
    commands = {
        "unregistered": running.node(INTRUDER, file),
        "keyless": running.outsider(INTRUDER, file),
        "plain": [*running.plain(INTRUDER, file), "--insecure", "--max-retries", "1"],
    }
    with ExitStack() as stack:
        logs = {work / f"{name}.log": command for name, command in commands.items()}
        yield {log: stack.enter_context(keep(command, running.env, log)) for log, command in logs.items()}
