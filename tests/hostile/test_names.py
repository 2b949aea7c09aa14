"""Names that belong to keys: who claims another's, or all, is refused and reported, and stops no run."""

import json
import re
from pathlib import Path

import pytest

from clients.app import app
from fedmeta.errors import FedmetaError
from fedmeta.progress import Progress
from server import membership, site_keys, training_loop
from server.membership import Membership
from tests.server.hospitals import hospital, hospitals
from tests.several_nodes import NODE_IDS, SeveralNodes, silence

ABBEY, MERCY, LIAR = NODE_IDS[0], NODE_IDS[1], NODE_IDS[4]


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of names and nodes, which the environment names."""
    path = tmp_path / "state" / "sites.json"
    monkeypatch.setenv(site_keys.SITE_KEYS, str(path))
    monkeypatch.setattr(membership, "POLL_S", 0.01)
    return path


def federation(folder: Path, *overrides: str) -> SeveralNodes:
    configs = [hospital(folder, name) for name in ("abbey", "mercy")]
    return SeveralNodes(app, hospitals(folder, *overrides), node_configs=configs)


def test_a_name_belongs_to_the_node_that_it_first_came_with(tmp_path: Path, keys: Path) -> None:
    grid = federation(tmp_path)
    membership = Membership(grid, grid.experiment)
    assert json.loads(keys.read_text()) == {"abbey": str(ABBEY), "mercy": str(MERCY)}
    # Also while its node is silent, and for good: another key does not take it over.
    grid.faults[ABBEY] = silence
    grid.join(LIAR, hospital(tmp_path, "abbey", 40))
    assert membership.poll_new_nodes() == [
        f"refused node {LIAR}: it claims abbey: its name belongs to the key of another node"
    ]
    assert membership.federation.node_ids.tolist() == [ABBEY, MERCY]
    assert membership.federation.train_rows.tolist() == [6, 6]
    grid.leave(ABBEY)
    again = Membership(grid, grid.experiment)
    assert again.federation.names == ("mercy",)
    assert list(again.refused) == [f"node {LIAR}"]
    # The operator may give the name to another key.
    keys.write_text(json.dumps({"abbey": str(LIAR), "mercy": str(MERCY)}))
    assert Membership(grid, grid.experiment).federation.node_ids.tolist() == [LIAR, MERCY]


@pytest.mark.parametrize("liar_first", [True, False])
def test_a_node_that_claims_all_names_has_none_of_them(tmp_path: Path, keys: Path, liar_first: bool) -> None:
    experiment = hospitals(tmp_path, 'server.wait_for=["abbey", "mercy"]', "server.round_timeout=60", "server.rounds=2")
    claims = {"partition-id": 0, "num-partitions": 1}  # a node that hosts a hundred sites, as in a simulation
    grid = SeveralNodes(app, experiment, nodes=0)
    if liar_first:
        grid.join(LIAR, claims)
    for node, name in ((ABBEY, "abbey"), (MERCY, "mercy")):
        grid.join(node, hospital(tmp_path, name))
    if not liar_first:
        grid.join(LIAR, claims)
    notes: list[Progress] = []
    outcome = training_loop.run(grid, experiment, notes.append)
    assert outcome.summary["rounds"] == 2
    assert sorted(set(outcome.sites["site"])) == ["abbey", "mercy"]
    assert json.loads(keys.read_text()) == {"abbey": str(ABBEY), "mercy": str(MERCY)}
    shown = [progress.note for progress in notes if progress.note]
    assert any(note.startswith(f"refused node {LIAR}: it claims ") for note in shown)
    entries = json.loads((outcome.folder / "failures.json").read_text())
    assert {entry["site"] for entry in entries} == {f"node {LIAR}"}


def test_a_required_name_that_another_claims_is_waited_for_and_not_refused(tmp_path: Path, keys: Path) -> None:
    keys.parent.mkdir()
    keys.write_text(json.dumps({"abbey": str(ABBEY)}))
    experiment = hospitals(tmp_path, 'server.wait_for=["abbey"]', "server.round_timeout=60")
    grid = SeveralNodes(app, experiment, nodes=0)
    grid.join(LIAR, hospital(tmp_path, "abbey", 40))
    asked = []

    def node_ids() -> list[int]:
        asked.append(len(asked))
        if len(asked) == 3:
            grid.join(ABBEY, hospital(tmp_path, "abbey"))
        return list(grid.contexts)

    grid.get_node_ids = node_ids
    assert Membership(grid, experiment).federation.node_ids.tolist() == [ABBEY]


def test_two_nodes_with_one_new_name_have_it_neither(tmp_path: Path, keys: Path) -> None:
    grid = federation(tmp_path)
    grid.join(LIAR, hospital(tmp_path, "abbey", 40))
    membership = Membership(grid, grid.experiment)
    assert membership.federation.names == ("mercy",)
    assert set(membership.refused) == {f"node {ABBEY}", f"node {LIAR}"}
    assert all(site_keys.CONTESTED_NAME in why for why in membership.refused.values())
    assert json.loads(keys.read_text()) == {"mercy": str(MERCY)}


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("[]", "names of sites and node ids"),
        ('{"abbey": 5}', "names of sites and node ids: abbey"),
        ('{"abbey": "five"}', '"abbey": the node id is no whole number'),
        ('{"a\\nb": "5"}', r'the site "a\nb" has a character that cannot be printed'),
        ("{" * 100_000, "names of sites and node ids"),
    ],
)
def test_a_file_of_keys_that_is_none_ends_in_one_line(tmp_path: Path, keys: Path, content: str, line: str) -> None:
    keys.parent.mkdir()
    keys.write_text(content)
    grid = federation(tmp_path)
    with pytest.raises(FedmetaError, match=re.escape(line)) as refusal:
        Membership(grid, grid.experiment)
    assert str(refusal.value).isprintable()
    assert keys.read_text() == content


def test_rows_and_weights_are_those_of_joining(tmp_path: Path) -> None:
    grid = federation(tmp_path, 'server.weighting="examples"')
    membership = Membership(grid, grid.experiment)
    (tmp_path / "later").mkdir()
    grid.join(LIAR, hospital(tmp_path / "later", "abbey", 4000))
    grid.leave(ABBEY)
    assert membership.poll_new_nodes() == ["abbey announces 2000 train rows and joined with 6: the first number stays"]
    assert membership.federation.node_ids.tolist() == [LIAR, MERCY]
    assert membership.federation.train_rows.tolist() == [6, 6]
    assert membership.federation.weights.tolist() == [6.0, 6.0]
