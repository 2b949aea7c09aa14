import re
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Message

from clients.app import app
from fedmeta.errors import FedmetaError
from server import membership as module
from server.federation import only
from server.membership import Membership
from server.site_statistics import ask_standardisation
from tests.server.hospitals import hospital, hospitals
from tests.several_nodes import NODE_IDS, SeveralNodes, breaks, silence


@pytest.fixture(autouse=True)
def _no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.01)


def test_sites_are_sorted_by_name_whichever_node_hosts_them(tmp_path: Path) -> None:
    names = ["mercy", "abbey", "zion"]
    grid = SeveralNodes(app, hospitals(tmp_path), node_configs=[hospital(tmp_path, name) for name in names])
    federation = Membership(grid, grid.experiment).federation
    assert federation.names == ("abbey", "mercy", "zion")
    assert federation.node_ids.tolist() == [NODE_IDS[1], NODE_IDS[0], NODE_IDS[2]]
    assert federation.classes == ("healthy", "ill")
    assert federation.features == ("age", "pressure")
    assert federation.train_rows.tolist() == federation.test_rows.tolist() == [6, 6, 6]
    assert federation.weights.tolist() == [6.0, 6.0, 6.0]
    assert federation.by_node(np.array([0, 2])) == {NODE_IDS[1]: ("abbey",), NODE_IDS[2]: ("zion",)}


def test_the_class_list_is_the_sorted_union(tmp_path: Path) -> None:
    configs = [
        hospital(tmp_path, "abbey", classes=("10", "9")),
        hospital(tmp_path, "mercy", classes=("2",)),
    ]
    grid = SeveralNodes(app, hospitals(tmp_path), node_configs=configs)
    assert Membership(grid, grid.experiment).federation.classes == ("2", "9", "10")


def test_new_sites_are_drawn_over_names_and_not_over_nodes(tmp_path: Path) -> None:
    drawn = []
    names = ["abbey", "mercy", "zion", "hope", "grace"]
    for order in (names, names[::-1]):
        experiment = hospitals(tmp_path, "data.new_sites=2")
        grid = SeveralNodes(app, experiment, node_configs=[hospital(tmp_path, name) for name in order])
        federation = Membership(grid, experiment).federation
        drawn.append(federation.new_sites)
        assert len(federation.training) == 3
        assert not set(federation.new_sites) & {federation.names[site] for site in federation.training}
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 2


def test_a_run_waits_for_the_sites_that_it_names(tmp_path: Path) -> None:
    experiment = hospitals(tmp_path, 'server.wait_for=["abbey", "zion"]', "server.round_timeout=60")
    grid = SeveralNodes(app, experiment, node_configs=[hospital(tmp_path, "abbey")])
    asked = []

    def node_ids() -> list[int]:
        asked.append(len(asked))
        if len(asked) == 3:
            grid.join(NODE_IDS[3], hospital(tmp_path, "zion"))
        return list(grid.contexts)

    grid.get_node_ids = node_ids
    assert Membership(grid, experiment).federation.names == ("abbey", "zion")
    assert len(asked) == 3
    # No node is asked twice.
    assert [message.metadata.dst_node_id for message in grid.sent] == [NODE_IDS[0], NODE_IDS[3]]


@pytest.mark.parametrize(("wait_for", "missing"), [('["abbey", "zion", "hope"]', "zion, hope"), ("4", "3 more sites")])
def test_a_run_reports_whom_it_waited_for_in_vain(tmp_path: Path, wait_for: str, missing: str) -> None:
    experiment = hospitals(tmp_path, f"server.wait_for={wait_for}", "server.round_timeout=0.05")
    grid = SeveralNodes(app, experiment, node_configs=[hospital(tmp_path, "abbey")])
    with pytest.raises(FedmetaError, match=f"^server.wait_for is not met, still missing: {missing}$"):
        Membership(grid, experiment)


def test_a_run_without_any_node_reports_it(tmp_path: Path) -> None:
    experiment = hospitals(tmp_path, "server.round_timeout=0.05")
    with pytest.raises(FedmetaError, match=r"^no node is connected$"):
        Membership(SeveralNodes(app, experiment, nodes=0), experiment)


@pytest.mark.parametrize(("fault", "reason"), [(silence, "no reply within 0.5 s"), (breaks, "error code 5")])
def test_nodes_that_cannot_say_whom_they_host_are_named(tmp_path: Path, fault: object, reason: str) -> None:
    grid = SeveralNodes(app, hospitals(tmp_path), node_configs=[hospital(tmp_path, "abbey")])
    grid.faults[NODE_IDS[0]] = fault
    expected = f"no node could report which sites it hosts: node {NODE_IDS[0]}: {reason}"
    with pytest.raises(FedmetaError, match=f"^{re.escape(expected)}$"):
        Membership(grid, grid.experiment)


@pytest.mark.parametrize(
    ("other", "shown"),
    [
        ({"columns": ("age", "weight")}, "columns too many: weight; columns missing: pressure"),
        ({"columns": ("age",)}, "columns missing: pressure"),
        ({"columns": ("age", "height", "pressure")}, "columns too many: height"),
        ({"classes": ("1.5", "2.25", "3.125")}, "its labels are numbers, the federation's classes"),
    ],
)
def test_a_site_that_differs_is_refused_and_the_others_continue(
    tmp_path: Path, other: dict[str, object], shown: str
) -> None:
    configs = [hospital(tmp_path, "abbey", **other), hospital(tmp_path, "mercy"), hospital(tmp_path, "zion")]
    for order in (configs, configs[::-1]):
        grid = SeveralNodes(app, hospitals(tmp_path), node_configs=order)
        membership = Membership(grid, grid.experiment)
        assert membership.federation.names == ("mercy", "zion")
        assert membership.federation.features == ("age", "pressure")
        assert membership.refused == {"abbey": shown}


def test_of_two_forms_with_equally_many_sites_the_first_sites_is_taken(tmp_path: Path) -> None:
    configs = [hospital(tmp_path, "zion", columns=("age",)), hospital(tmp_path, "abbey")]
    grid = SeveralNodes(app, hospitals(tmp_path), node_configs=configs)
    membership = Membership(grid, grid.experiment)
    assert membership.federation.names == ("abbey",)
    assert membership.refused == {"zion": "columns missing: pressure"}


@pytest.mark.parametrize(("wait_for", "missing"), [('["abbey", "zion"]', "zion"), ("3", "1 more sites")])
def test_a_run_that_needs_a_refused_site_reports_how_it_differs(tmp_path: Path, wait_for: str, missing: str) -> None:
    experiment = hospitals(tmp_path, f"server.wait_for={wait_for}", "server.round_timeout=0.2")
    configs = [hospital(tmp_path, "abbey"), hospital(tmp_path, "mercy"), hospital(tmp_path, "zion", columns=("age",))]
    grid = SeveralNodes(app, experiment, node_configs=configs)
    shown = f"server.wait_for is not met, still missing: {missing}; zion cannot take part: columns missing: pressure"
    with pytest.raises(FedmetaError, match=f"^{re.escape(shown)}$"):
        Membership(grid, experiment)


def test_a_late_joiner_is_a_new_site(tmp_path: Path) -> None:
    grid = SeveralNodes(app, hospitals(tmp_path), node_configs=[hospital(tmp_path, "mercy")])
    membership = Membership(grid, grid.experiment)
    assert membership.poll_new_nodes() == []
    grid.join(NODE_IDS[4], hospital(tmp_path, "abbey", rows=8, classes=("ill", "unheard of")))
    assert membership.poll_new_nodes() == ["abbey joined as new"]
    federation = membership.federation
    assert federation.names == ("abbey", "mercy")
    assert federation.new.tolist() == [True, False]
    assert federation.node_ids.tolist() == [NODE_IDS[4], NODE_IDS[0]]
    assert federation.train_rows.tolist() == [4, 6]
    assert federation.classes == ("healthy", "ill")
    assert membership.poll_new_nodes() == []


def test_a_late_joiner_trains_where_the_experiment_admits_it(tmp_path: Path) -> None:
    experiment = hospitals(tmp_path, "server.admit=true")
    grid = SeveralNodes(app, experiment, node_configs=[hospital(tmp_path, "mercy")])
    membership = Membership(grid, experiment)
    grid.join(NODE_IDS[4], hospital(tmp_path, "abbey"))
    assert membership.poll_new_nodes() == ["abbey joined as training"]
    assert membership.federation.training.tolist() == [0, 1]


def test_a_late_joiner_with_other_columns_is_refused_and_the_run_continues(tmp_path: Path) -> None:
    grid = SeveralNodes(app, hospitals(tmp_path), node_configs=[hospital(tmp_path, "mercy")])
    membership = Membership(grid, grid.experiment)
    before = membership.federation
    grid.join(NODE_IDS[4], hospital(tmp_path, "abbey", columns=("age", "weight")))
    assert membership.poll_new_nodes() == ["refused abbey: columns too many: weight; columns missing: pressure"]
    assert membership.federation is before
    assert set(membership.refused) == {"abbey"}


def test_a_node_that_comes_back_under_a_new_id_keeps_its_site(tmp_path: Path) -> None:
    configs = [hospital(tmp_path, "abbey"), hospital(tmp_path, "mercy")]
    grid = SeveralNodes(app, hospitals(tmp_path, "data.new_sites=1"), node_configs=configs)
    membership = Membership(grid, grid.experiment)
    before = membership.federation
    grid.join(NODE_IDS[4], grid.leave(NODE_IDS[0]))
    assert membership.poll_new_nodes() == []
    assert membership.federation.node_ids.tolist() == [NODE_IDS[4], NODE_IDS[1]]
    assert membership.federation.names == before.names
    assert membership.federation.new.tolist() == before.new.tolist()


def test_a_node_that_comes_back_while_its_old_id_still_stands_keeps_its_site(tmp_path: Path) -> None:
    grid = SeveralNodes(app, hospitals(tmp_path), node_configs=[hospital(tmp_path, "abbey")])
    membership = Membership(grid, grid.experiment)
    # For the better part of a minute Flower lists a node that was killed.
    grid.faults[NODE_IDS[0]] = breaks
    grid.join(NODE_IDS[4], dict(grid.contexts[NODE_IDS[0]].node_config))
    assert membership.poll_new_nodes() == []
    assert membership.federation.node_ids.tolist() == [NODE_IDS[4]]
    assert membership.refused == {}


def test_two_nodes_with_one_sites_name_are_refused_at_the_start_and_the_others_continue(tmp_path: Path) -> None:
    configs = [hospital(tmp_path, "abbey"), hospital(tmp_path, "mercy"), hospital(tmp_path, "abbey", 20)]
    grid = SeveralNodes(app, hospitals(tmp_path), node_configs=configs)
    membership = Membership(grid, grid.experiment)
    assert membership.federation.names == ("mercy",)
    assert membership.refused == {"abbey": "another node serves this site too; stop one of the two"}
    experiment = hospitals(tmp_path, 'server.wait_for=["abbey", "mercy"]')
    with pytest.raises(FedmetaError, match=r"still missing: abbey; abbey cannot take part: another node serves this"):
        Membership(SeveralNodes(app, experiment, node_configs=configs), experiment)


def test_a_second_node_of_a_site_is_refused_and_taken_once_the_first_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.0)
    grid = SeveralNodes(app, hospitals(tmp_path), node_configs=[hospital(tmp_path, "abbey")])
    membership = Membership(grid, grid.experiment)
    grid.join(NODE_IDS[4], hospital(tmp_path, "abbey", 20))
    assert membership.poll_new_nodes() == ["refused abbey: another node serves this site too; stop one of the two"]
    assert membership.federation.node_ids.tolist() == [NODE_IDS[0]]
    monkeypatch.setattr(module, "BACKOFF_FACTOR", 0.0)
    grid.leave(NODE_IDS[0])
    membership._paused.clear()
    assert membership.poll_new_nodes() == []
    assert membership.federation.node_ids.tolist() == [NODE_IDS[4]]


def test_a_node_whose_first_answer_failed_is_asked_again_after_a_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [hospital(tmp_path, "abbey"), hospital(tmp_path, "mercy")]
    grid = SeveralNodes(app, hospitals(tmp_path), node_configs=configs)
    grid.faults[NODE_IDS[1]] = breaks
    membership = Membership(grid, grid.experiment)
    assert membership.federation.names == ("abbey",)
    del grid.faults[NODE_IDS[1]]
    assert membership.poll_new_nodes() == []
    asked = [message.metadata.dst_node_id for message in grid.sent]
    assert sorted(asked) == sorted(NODE_IDS[:2])
    monkeypatch.setattr(module.time, "monotonic", lambda: 1e9)
    assert membership.poll_new_nodes() == ["mercy joined as new"]
    # A site that is waited for is asked for again until then.
    monkeypatch.undo()
    monkeypatch.setattr(module, "POLL_S", 0.01)
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(module, "BACKOFF_FACTOR", 0.0)
    experiment = hospitals(tmp_path, 'server.wait_for=["abbey"]', "server.round_timeout=60")
    grid = SeveralNodes(app, experiment, node_configs=configs[:1])
    failed: list[Message] = []

    def fails_twice(message: Message, reply: Message) -> Message:
        failed.append(message)
        return reply if len(failed) > 2 else breaks(message, reply)

    grid.faults[NODE_IDS[0]] = fails_twice
    assert Membership(grid, experiment).federation.names == ("abbey",)


def test_standardisation_is_that_of_training_sites_train_rows(tmp_path: Path) -> None:
    experiment = hospitals(tmp_path, "data.new_sites=1", 'data.split="blocks"')
    configs = [hospital(tmp_path, name, rows) for name, rows in (("abbey", 20), ("mercy", 30), ("zion", 14))]
    grid = SeveralNodes(app, experiment, node_configs=configs)
    federation = Membership(grid, experiment).federation
    rows = []
    for site in federation.training:
        table = (tmp_path / f"{federation.names[site]}.csv").read_text().splitlines()[1:]
        values = [[float(cell) for cell in line.split(",")[:2]] for line in table]
        rows += values[: federation.train_rows[site]]
    scale, refused = ask_standardisation(grid, federation, experiment)
    assert refused == {}
    assert np.allclose(scale["standardisation.mean"].numpy(), np.mean(rows, axis=0), atol=1e-6)
    assert np.allclose(scale["standardisation.scale"].numpy(), np.std(rows, axis=0), rtol=1e-6)


def test_a_run_starts_without_a_nodes_sums_where_min_sites_allows(tmp_path: Path) -> None:
    configs = [hospital(tmp_path, name) for name in ("abbey", "mercy")]
    grid = SeveralNodes(app, hospitals(tmp_path), node_configs=configs)
    federation = Membership(grid, grid.experiment).federation
    alone, _ = ask_standardisation(grid, only(federation, {"abbey"}), grid.experiment)
    grid.faults[NODE_IDS[1]] = silence
    scale, refused = ask_standardisation(grid, federation, grid.experiment)
    assert refused == {"mercy": "no feature sums: no reply within 0.5 s"}
    assert all(torch.equal(value, alone[name]) for name, value in scale.items())
    both = hospitals(tmp_path, "server.min_sites=2")
    shown = "1 sites sent usable feature sums; mercy: no feature sums: no reply within 0.5 s"
    with pytest.raises(FedmetaError, match=f"^{re.escape(shown)}$"):
        ask_standardisation(grid, federation, both)
