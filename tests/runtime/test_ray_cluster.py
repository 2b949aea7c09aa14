"""A Ray cluster of several nodes, simulated on this machine: the run uses them all, and its result is the local one."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedmeta.runtime import ray as module
from fedmeta.runtime import run, superlink
from tests.runtime.processes import marked, wait_until
from tests.runtime.test_ray import assert_agree, digits, mark, work

__all__ = ["mark", "work"]

CLIENT = """
import os
from pathlib import Path

import ray
from flwr.clientapp import ClientApp

from clients.app import app as real


class Placed(ClientApp):
    def __call__(self, message, context):
        if message.metadata.message_type == "train":
            node = ray.get_runtime_context().get_node_id()
            Path({folder!r}, node + "-" + str(context.node_config["partition-id"])).touch()
        return real(message, context)


app = Placed()
"""


@pytest.mark.slow
def test_a_cluster_of_several_nodes_gives_the_local_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: str
) -> None:
    from ray.cluster_utils import Cluster

    seen = tmp_path / "seen"
    seen.mkdir()
    before = superlink.write_app

    def write_placed_app(folder: Path) -> Path:
        before(folder)
        (folder / "placed").mkdir()
        (folder / "placed" / "__init__.py").touch()
        (folder / "placed" / "app.py").write_text(CLIENT.format(folder=str(seen)))
        project = (folder / "pyproject.toml").read_text().replace('"clients.app:app"', '"placed.app:app"')
        (folder / "pyproject.toml").write_text(project.replace("fab-include = [", 'fab-include = ["placed/**/*.py", '))
        return folder

    monkeypatch.setattr(module, "write_app", write_placed_app)
    for name, value in module._QUIET_RAY.items():
        monkeypatch.setenv(name, value)
    own = ("runtime.nodes=2", "runtime.threads=1", "server.sites_per_round=0", "server.rounds=2")
    local = run(digits(tmp_path / "local", *own))
    machine = {"num_cpus": 1, "object_store_memory": 1 << 28}
    cluster = Cluster(initialize_head=True, head_node_args={**machine, "include_dashboard": False})
    try:
        cluster.add_node(**machine)
        cluster.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        found = run(digits(tmp_path / "ray", *own), runtime="ray")
    finally:
        cluster.shutdown()
        # The cluster's own processes end a moment after it; what the run left is the fixture's to find.
        wait_until(lambda: not marked(mark))
    assert_agree(local, found)
    placed = [path.name.rpartition("-") for path in seen.iterdir()]
    assert len({node for node, _, _ in placed}) == 2, "both nodes of the cluster work"
    assert {part for _, _, part in placed} == {"0", "1"}
