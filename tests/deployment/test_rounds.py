"""Secure sums, quorums and compression over real processes: who drops out, who is slow, what was not sent.

One federation of five sites serves all tests; each site's app is a copy of a process that has torch.
"""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import fedmeta
from clients import compressed
from clients.app import app
from fedmeta import checkpoint
from fedmeta.progress import ignore_progress
from server import training_loop
from tests.deciding import DECIDED, DECIDING, DEPLOYED
from tests.deployment.processes import write_sites
from tests.deployment.test_faults import (
    Federation,
    await_true,
    experiment_of,
    faulty_federation,
    meanwhile,
    rounds_of,
    store_of,
)
from tests.deployment.watching import recorded_line
from tests.several_nodes import NODE_IDS, SeveralNodes

pytestmark = pytest.mark.slow

SECURE = "privacy.secure_aggregation=true"
PLAIN = ("data.new_sites=0", "server.norm_cap=0", "evaluation.local_baseline=none", "server.optimizer=sgd")
SLOW_S = 30.0
WIRED = "site-1"
"""The site whose line is recorded."""


@dataclass(frozen=True)
class Running:
    """Some sites over real processes.

    Attributes:
        federation: The processes.
        files: Each site's rows.
        went_up: What went up the line of `WIRED`.
        ends: What ends each site's node and the process that runs submitted code.
    """

    federation: Federation
    files: dict[str, Path]
    went_up: bytearray
    ends: dict[str, ExitStack]

    def start(self, site: str, way: int = 0) -> None:
        """Starts a site's node and app."""
        self.ends[site] = ends = ExitStack()
        whole, self.federation.stack = self.federation.stack, ends
        try:
            self.federation.start_node_and_app(site, self.files[site], way)
        finally:
            self.federation.stack = whole

    def experiment(self, name: str, *own: str, rounds: int = 2) -> fedmeta.Experiment:
        """Returns an experiment whose runs lie in a folder of this name."""
        work = self.federation.work
        settings = {"rounds": rounds, "store": store_of(work), "folder": work / name, "timeout": 240.0}
        return experiment_of(work, [*self.files], **settings).with_overrides([*PLAIN, *own])

    def mark(self, name: str, text: str = "") -> Path:
        """Makes a file by which the sites' app does something."""
        path = self.federation.marks / name
        path.write_text(text)
        return path


@contextmanager
def started(work: Path, sites: int) -> Iterator[Running]:
    """Runs a federation of so many sites."""
    files = write_sites(work / "data", sites=sites, rows=40)
    with faulty_federation(work, poll_s="1.0") as federation, ExitStack() as stack:
        way, went_up = stack.enter_context(recorded_line(federation.port))
        running = Running(federation, files, went_up, {})
        stack.callback(lambda: [ends.close() for ends in running.ends.values()])
        for site in files:
            running.start(site, way if site == WIRED else 0)
        yield running


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with started(tmp_path_factory.mktemp("rounds"), 5) as running:
        yield running


@pytest.fixture(autouse=True)
def no_marks(five: Running) -> Iterator[None]:
    yield
    for path in five.federation.marks.iterdir():
        path.unlink()


# ---------------------------------------------------------------- drop-outs


def test_sites_that_drop_out_at_each_step_are_named_and_the_others_summed(five: Running) -> None:
    lost = {2: ("site-1", "query.keys"), 3: ("site-2", "query.shares"), 4: ("site-3", "train.masked")}
    lost[5] = ("site-4", "query.unmask")
    for number, (site, kind) in lost.items():
        five.mark(f"lost-{site}-{kind}-train-{number}")
    own = ("evaluation.every=0", "server.lr=0.5")
    result = fedmeta.run(five.experiment("dropped", SECURE, *own, rounds=5), runtime="deployment")
    entries = [entry for entry in missed_in(five, "dropped") if entry["what"] == "training"]
    reasons = {(entry["round"], entry["site"]): str(entry["reason"]) for entry in entries}
    # Who is lost after its numbers were sent is in the sum, and is missing in nothing.
    assert set(reasons) == {(number, site) for number, (site, _) in lost.items() if number < 5}
    for number in (2, 3, 4):
        site, kind = lost[number]
        assert reasons[number, site].startswith(f"dropped out at {kind}: error code")
    state = plain_state(five, own, {number: site for number, (site, _) in lost.items() if number < 5})
    for name, value in state.items():
        torch.testing.assert_close(result.meta_state[name], value, rtol=0, atol=1e-5)
    kept = checkpoint.newest(result.folder)[0]
    assert dict(zip(kept.names, kept.took_part, strict=True)) == {
        "site-0": 5, "site-1": 4, "site-2": 4, "site-3": 4, "site-4": 5
    }  # fmt: skip


def plain_state(five: Running, own: tuple[str, ...], lost: dict[int, str]) -> dict[str, torch.Tensor]:
    """Returns the state of the plain run in this process whose sites are lost in the same rounds."""
    configs = [{"site": site, "data": str(file)} for site, file in five.files.items()]
    experiment = five.experiment("plain", *own, rounds=5)
    grid = SeveralNodes(app, experiment, node_configs=configs)
    for node, site in zip(NODE_IDS, five.files, strict=True):
        grid.faults[node] = lambda message, reply, site=site: (
            None
            if message.metadata.message_type == "train" and lost.get(int(message.metadata.group_id)) == site
            else reply
        )
    return training_loop.run(grid, experiment, ignore_progress).meta_state


# ---------------------------------------------------------------- a slow site


def test_a_quorum_does_not_wait_for_a_site_that_sleeps(five: Running) -> None:
    rounds, seconds = 4, {}
    own = ("evaluation.every=0", "server.lr=0.5")
    asked: dict[str, list[str]] = {}
    counted = {}
    for name, more in (("all-awake", ()), ("one-sleeps", ("server.quorum=0.8",))):
        if more:
            five.mark("slow-site-4", str(SLOW_S))
        result = fedmeta.run(five.experiment(name, *own, *more, rounds=rounds), runtime="deployment")
        times = rounds_of(store_of(five.federation.work), result.summary["run_id"], "time/round_s")
        seconds[name] = sum(times.values())
        kept = checkpoint.newest(result.folder)[0]
        counted[name] = dict(zip(kept.names, kept.took_part, strict=True))
        marks = [path.name for path in five.federation.marks.glob("site-*-train-*")]
        asked[name] = sorted(mark for mark in marks if mark.startswith("site-4-"))
        for mark in marks:
            (five.federation.marks / mark).unlink()
    ratio = seconds["one-sleeps"] / seconds["all-awake"]
    print(f"{rounds} rounds: {seconds}, {ratio:.2f} times as long with one of five sites sleeping {SLOW_S:g} s a round")
    others = [f"site-{number}" for number in range(4)]
    assert counted["all-awake"] == dict.fromkeys([*others, "site-4"], rounds)
    # Each of the others is in each round once; the slow one in no more than it was asked for.
    assert [counted["one-sleeps"][site] for site in others] == [rounds] * 4
    assert counted["one-sleeps"]["site-4"] <= len(asked["one-sleeps"]) < rounds
    entries = [entry for entry in missed_in(five, "one-sleeps") if entry["what"] == "late"]
    assert {entry["site"] for entry in entries} == {"site-4"}
    assert len(entries) + counted["one-sleeps"]["site-4"] >= len(asked["one-sleeps"])


def missed_in(five: Running, name: str) -> list[dict[str, object]]:
    (path,) = (five.federation.work / name).glob("*/failures.json")
    entries: list[dict[str, object]] = json.loads(path.read_text())
    return entries


# ---------------------------------------------------------------- compression


def test_what_top_k_did_not_send_survives_a_restart_and_bytes_are_those_on_the_line(
    five: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ("evaluation.every=0", "server.lr=0.5", "server.compression=top-k", "server.compression_keep=0.2")
    five.mark("record")
    held = five.mark("hold-site-2-train-2")
    before = len(five.went_up)

    def restart() -> None:
        five.federation.await_mark("sent-site-0-train-2")
        time.sleep(10.0)  # the reply reaches the server
        five.ends["site-0"].close()
        log = five.federation.work / "site-0.log"
        log.unlink()
        five.start("site-0")
        await_true(lambda: "SuperNode ID" in log.read_text(), "the node's return")
        held.unlink()

    with meanwhile(restart):
        result = fedmeta.run(five.experiment("top-k", *own, rounds=4), runtime="deployment")

    def local(name: str) -> dict[str, torch.Tensor]:
        return fedmeta.run(five.experiment(name, *own, rounds=4)).meta_state

    for name, value in local("top-k-local").items():
        torch.testing.assert_close(result.meta_state[name], value, rtol=0, atol=1e-5)
    monkeypatch.setattr(compressed, "read", lambda *_: None)
    forgetful = local("top-k-forgetful")
    assert any(not torch.allclose(value, forgetful[name], atol=1e-3) for name, value in result.meta_state.items())

    sent = {path.name: pickle.loads(path.read_bytes()) for path in five.federation.marks.glob("sent-*-train-*")}
    assert len(sent) == 20
    counted = rounds_of(store_of(five.federation.work), result.summary["run_id"], "traffic/bytes_up")
    for number in range(1, 5):
        assert counted[number] == sum(own["bytes"] for name, own in sent.items() if name.endswith(f"-{number}"))
    line = bytes(five.went_up[before:])
    for number in range(1, 5):
        arrays = {key: own for key, own in sent[f"sent-{WIRED}-train-{number}"].items() if key.startswith("wire/")}
        assert arrays
        assert all(line.count(own) >= 1 for own in arrays.values())


# ---------------------------------------------------------------- runs that decide


@pytest.mark.parametrize("name", DEPLOYED)
def test_a_deployed_run_decides_like_a_simulated_one(five: Running, name: str) -> None:
    experiment = five.experiment(name.replace(" ", "-"), *DECIDING[name], rounds=3)
    deployed, local = fedmeta.run(experiment, runtime="deployment"), fedmeta.run(experiment)
    assert deployed.summary["failures"] == 0
    for key, value in local.meta_state.items():
        torch.testing.assert_close(deployed.meta_state[key], value, rtol=0, atol=1e-5)
    decisions = [
        [(each["round"], each["what"]) for each in result.summary.get("ledger", [])] for result in (deployed, local)
    ]
    assert decisions[0] == decisions[1]
    if name in DECIDED:
        assert DECIDED[name] in [what for _, what in decisions[0]]
