import base64
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedmeta.certs import make_certs
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.runtime.dry_run import dry_run, format_messages, read_node_config
from tests.deployment.processes import write_sites

SETTINGS = """
[data]
source = "tables"
path = "sites"
support = 6
query = 6
[model]
name = "logistic"
[learner]
inner_steps = 2
[server]
min_sites = 3
wait_for = 5
"""


@pytest.fixture
def site(tmp_path: Path) -> str:
    return f'site="hospital-a" data="{write_sites(tmp_path / "data with space", 1)["site-0"]}"'


def test_every_message_of_a_run_is_shown(site: str) -> None:
    replies = dry_run(Experiment.from_toml(SETTINGS), site)
    kinds = [reply.kind for reply in replies]
    assert {kinds[0], kinds[-1]} == {"query.sites", "evaluate"}
    assert {"query.sums", "train"} < set(kinds)
    content = {(reply.kind, record, key): value for reply in replies for record, key, value in reply.entries}
    assert content["query.sites", "sites", "names"] == ["hospital-a"]
    assert content["query.sites", "schema", "features"] == ["age", "chol", "pressure"]
    total = content["query.sums", "sums", "total"]
    assert np.frombuffer(base64.b64decode(total["base64"]), total["type"]).shape == (3,)
    gradients = [key for kind, record, key in content if (kind, record) == ("train", "gradient")]
    assert gradients
    assert all(reply.size > 0 for reply in replies)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["server.aggregator=krum"],
        ["server.aggregator=bulyan", "server.byzantine=2", "server.mixing=true"],
        ["privacy.clip_norm=0.5", "privacy.noise_multiplier=0.4", "privacy.epsilon=1", "server.sites_per_round=2"],
    ],
)
def test_what_a_federation_may_ask_a_site_alone_is_shown_too(site: str, settings: list[str]) -> None:
    plain = {reply.kind: reply for reply in dry_run(Experiment.from_toml(SETTINGS), site)}
    shown = {reply.kind: reply for reply in dry_run(Experiment.from_toml(SETTINGS).with_overrides(settings), site)}
    assert shown.keys() == plain.keys()
    shapes, usual = (
        {key: value["shape"] for record, key, value in replies["train"].entries if record == "gradient"}
        for replies in (shown, plain)
    )
    one = [1] if settings[0].startswith("server.aggregator") else []
    assert shapes == {key: one + shape for key, shape in usual.items()}


def test_nothing_of_a_row_is_in_a_message(site: str) -> None:
    replies = dry_run(Experiment.from_toml(SETTINGS), site)
    text = format_messages(replies, as_json=True)
    cells = {
        cell
        for line in Path(site.split('"')[3]).read_text().splitlines()[1:]
        for cell in line.split(",")
        if "." in cell
    }
    assert len(cells) > 50
    assert not [cell for cell in cells if cell in text]


def test_bytes_add_up_in_both_views(site: str) -> None:
    replies = dry_run(Experiment.from_toml(SETTINGS), site)
    lines = [json.loads(line) for line in format_messages(replies, as_json=True).splitlines()]
    total = sum(line["bytes"] for line in lines)
    assert (
        format_messages(replies, as_json=False).splitlines()[-1]
        == f"{len(lines)} messages, {total} bytes; nothing was sent"
    )


@pytest.mark.slow
def test_the_command_line_shows_it(site: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(SETTINGS)
    make_certs(tmp_path / "certs", [], ["hospital-a"])
    command = [sys.executable, "-m", "fedmeta", "sites", "run.toml", "--node-config", site]
    command += ["--certs", "certs/sites/hospital-a"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "query.sums: " in done.stdout
    assert "    min_test = 1\n    max_inner_steps = 200\n    max_evaluations = 20\n" in done.stdout
    assert "requests are counted while the node lives, by run: give it a folder" in done.stdout
    assert "certs/sites/hospital-a/egress.crt: 824 days left" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["certs", "data with space", "run.toml"]
    done = subprocess.run([*command, "--json"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert all("message" in json.loads(line) for line in done.stdout.splitlines())
    assert "min_test = 1" in done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('site="a"', 'data="FILE" is missing'),
        ("site=a b data=c", "texts in double quotes"),
        ('site="a" data=/data/a.csv', "--node-config"),
        ('site="a" site="b" data="c"', "--node-config"),
        ('site="a" data="/nowhere/a.csv"', "/nowhere/a.csv"),
    ],
)
def test_a_wrong_node_config_is_named(text: str, words: str) -> None:
    with pytest.raises(FedmetaError, match=words):
        dry_run(Experiment.from_toml(SETTINGS), text)


def test_a_node_config_is_read_as_flower_reads_it() -> None:
    read = read_node_config('site="a b" data="/x=y/a.csv" share=3 on=true ')
    assert read == {"site": "a b", "data": "/x=y/a.csv", "share": 3, "on": True}
