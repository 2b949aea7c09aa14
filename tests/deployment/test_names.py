"""A site's name belongs to its key: with real SuperLink and SuperNodes over TLS, and node authentication."""

import json
from contextlib import ExitStack
from pathlib import Path

import pytest

import fedmeta
from server import site_keys
from tests.deployment.processes import INTRUDER, Federation, federation, register, write_sites
from tests.deployment.test_processes import EXPERIMENT


@pytest.mark.slow
def test_a_registered_key_cannot_take_another_sites_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_sites(tmp_path / "data")
    keys = tmp_path / "sites.json"
    monkeypatch.setenv(site_keys.SITE_KEYS, str(keys))  # the ServerApp's environment is that of its SuperLink

    def experiment(folder: str, wait_for: str) -> fedmeta.Experiment:
        text = EXPERIMENT.format(
            data=tmp_path / "data", sites=wait_for, store=tmp_path / "mlflow.db", folder=tmp_path / folder
        )
        (tmp_path / f"{folder}.toml").write_text(text)
        return fedmeta.load_experiment(tmp_path / f"{folder}.toml")

    with federation(tmp_path, files, forked=True) as running:
        first = fedmeta.run(experiment("first", str([*files]).replace("'", '"')), runtime="deployment")
        owners = json.loads(keys.read_text())
        assert set(owners) == set(files)
        assert set(first.sites["site"]) == set(files)
        # The intruder's key is registered, as that of a site that has turned. Its node gives the name of another.
        register([running.certs / "sites" / INTRUDER / "node.pub"])
        with ExitStack() as stack:
            stack.enter_context(running.forked(impostor(running, files), tmp_path / "impostor.log"))
            second = fedmeta.run(experiment("second", "3"), runtime="deployment")
        assert json.loads(keys.read_text()) == owners
        assert second.summary["rounds"] == 2
        assert set(second.sites["site"]) == set(files)
        (failures,) = (tmp_path / "second").glob("*/failures.json")  # the server's own folder: it is on this machine
        missed = json.loads(failures.read_text())
        refused = [entry for entry in missed if "its name belongs to the key of another node" in entry["reason"]]
        assert {entry["site"] for entry in refused} & {f"node {node}" for node in owners.values()} == set()
        assert len({entry["site"] for entry in refused}) == 1


def impostor(running: Federation, files: dict[str, Path]) -> list[str]:
    """Returns the command of a node with the intruder's key that gives the name of another site."""
    command = running.node(INTRUDER, files["site-0"])
    place = command.index("--node-config") + 1
    command[place] = f'site="site-0" data="{files["site-1"]}"'
    return command
