"""A site's own policy: a request for more is answered with a code, whatever the experiment asks for."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict

from clients import policy as module
from clients.app import app
from clients.local_state import StorageError
from clients.policy import FILE, Policy, PolicyError, count_request, policy_of
from fedmeta.build import learner_of
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.messages import (
    EVALUATE,
    QUERY_ENGINE,
    QUERY_SITES,
    QUERY_SUMS,
    TRAIN,
    EvaluateReply,
    RoundRequest,
    SumsRequest,
    TrainReply,
    failure,
)
from tests.server.hospitals import hospital, hospitals
from tests.several_nodes import NODE_IDS, SeveralNodes

CLASSES = ("healthy", "ill")


def config(folder: Path, rows: int = 100, **own: Any) -> dict[str, Any]:
    """A site with its file and the default policy, but for what is given."""
    made = hospital(folder, "abbey", rows=rows)
    return {"site": made["site"], "data": made["data"], "state": str(folder / "state"), **own}


def experiment(folder: Path, *overrides: str) -> Experiment:
    return hospitals(folder, "data.support=10", "data.query=10", *overrides)


def request(chosen: Experiment, **more: Any) -> RecordDict:
    state = learner_of(chosen, (2,), CLASSES).init(0)
    scale = {"standardisation.mean": torch.zeros(2), "standardisation.scale": torch.ones(2)}
    settings = {"round_number": 1, "run": "a-run", "steps": 1, "engine": "vmap", **more}
    return RoundRequest({**state, **scale}, classes=CLASSES, names=("abbey",), **settings).pack()


def ask(grid: SeveralNodes, kind: str, content: RecordDict) -> RecordDict:
    (reply,) = grid.send_and_receive([grid.create_message(content, kind, NODE_IDS[0], "1")])
    return reply.content


def asked(own: dict[str, Any], chosen: Experiment, kind: str, **more: Any) -> RecordDict:
    return ask(SeveralNodes(app, chosen, node_configs=[own]), kind, request(chosen, **more))


@pytest.mark.parametrize("kind", [TRAIN, EVALUATE, QUERY_ENGINE])
def test_a_site_of_a_hundred_rows_answers_under_the_default_policy(kind: str, tmp_path: Path) -> None:
    assert failure(asked(config(tmp_path), experiment(tmp_path), kind)) is None


CASES: dict[str, tuple[dict[str, Any], tuple[str, ...], str, dict[str, Any]]] = {
    "few support rows": ({}, ("data.support=9",), TRAIN, {}),
    "few support rows, at an evaluation": ({}, ("data.support=9",), EVALUATE, {}),
    "few support rows, for the engine": ({}, ("data.support=9",), QUERY_ENGINE, {}),
    "few query rows": ({}, ("data.query=9",), TRAIN, {}),
    "few test rows": ({}, ("data.test=0.05",), EVALUATE, {}),
    "few rows at all": ({"rows": 12}, (), TRAIN, {}),
    "more rows are asked for": ({"min_support": 11}, (), TRAIN, {}),
    "many inner steps": ({}, ("learner.inner_steps=201",), TRAIN, {}),
    "many local steps": ({}, ("learner.name=per-fedavg", "learner.local_steps=201"), TRAIN, {}),
    "many steps at an evaluation": ({}, (), EVALUATE, {"steps": 201}),
    "no evaluation": ({"max_evaluations": 0}, (), EVALUATE, {}),
    "no request": ({"max_requests": 0}, (), TRAIN, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_goes_beyond_the_policy_is_refused_with_a_code(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own, overrides, kind, more = CASES[case]
    reply = asked(config(tmp_path, **own), experiment(tmp_path, *overrides), kind, **more)
    assert {name: dict(record) for name, record in reply.items()} == {"failure": {"code": "beyond-policy"}}
    assert "fedmeta: beyond-policy: " in caplog.text, "the node's own log has the reason"


def test_sums_of_few_rows_stay(tmp_path: Path) -> None:
    for rows, code in ((100, None), (12, "beyond-policy")):
        (tmp_path / str(code)).mkdir()
        grid = SeveralNodes(app, experiment(tmp_path), node_configs=[config(tmp_path / str(code), rows)])
        assert failure(ask(grid, QUERY_SUMS, SumsRequest(("abbey",)).pack())) == code
        assert failure(ask(grid, QUERY_SITES, RecordDict())) is None


@pytest.mark.parametrize("key", [*Policy.__dataclass_fields__])
def test_no_experiment_holds_a_key_of_it(key: str) -> None:
    for section in Experiment.model_fields:
        with pytest.raises(FedmetaError, match=key):
            Experiment.from_toml(f"[{section}]\n{key} = 1\n")


def test_evaluations_are_counted_by_run_and_over_restarts(tmp_path: Path) -> None:
    own, chosen = config(tmp_path, max_evaluations=2), experiment(tmp_path)
    codes = [failure(asked(own, chosen, EVALUATE)) for _ in range(3)]  # each time a node that was just started
    assert codes == [None, None, "beyond-policy"]
    assert failure(asked(own, chosen, EVALUATE, run="another")) is None
    assert failure(asked(own, chosen, TRAIN)) is None


def test_without_a_folder_they_are_counted_while_the_node_lives(tmp_path: Path) -> None:
    own, chosen = config(tmp_path, max_evaluations=1), experiment(tmp_path)
    del own["state"]
    grid = SeveralNodes(app, chosen, node_configs=[own])
    assert [failure(ask(grid, EVALUATE, request(chosen))) for _ in range(2)] == [None, "beyond-policy"]


def context(folder: Path) -> Context:
    return Context(1, 1, {"data": "x", "state": str(folder)}, RecordDict(), {})


def test_requests_of_an_hour_are_bounded_also_where_the_clock_jumps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, now = Policy(max_requests=3), [time.time()]
    monkeypatch.setattr(module.time, "time", lambda: now[0])

    def granted() -> bool:
        try:
            count_request(policy, context(tmp_path), "r", evaluation=False)
        except PolicyError:
            return False
        return True

    assert [granted() for _ in range(4)] == [True, True, True, False]
    now[0] -= 7200
    assert not granted(), "a clock that was set back makes no request free"
    now[0] += 7200 + module.HOUR_S + 1
    assert granted()


@pytest.mark.parametrize("text", ["{", "[]", '{"times": 3, "evaluations": {}}', '{"times": ["x"], "evaluations": {}}'])
def test_counts_that_cannot_be_read_grant_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / module.LEDGER).write_text(text)
    with pytest.raises(StorageError, match=r"requests\.json: cannot be read"):
        count_request(Policy(), context(tmp_path), "r", evaluation=False)


def test_many_runs_leave_few_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_RUNS", 3)
    for number in range(6):
        count_request(Policy(), context(tmp_path), f"run-{number}", evaluation=True)
    counts = json.loads((tmp_path / module.LEDGER).read_text())
    assert list(counts["evaluations"]) == ["run-3", "run-4", "run-5"]


def test_rounded_figures_have_two_decimals_and_no_sums_of_rows(tmp_path: Path) -> None:
    chosen = experiment(tmp_path)
    like = learner_of(chosen, (2,), CLASSES).init(0)
    exact, rounded = (config(tmp_path, metrics=metrics) for metrics in ("exact", "rounded"))
    losses = [TrainReply.unpack(asked(own, chosen, TRAIN), like).query_loss for own in (exact, rounded)]
    assert losses[1].tolist() == np.round(losses[0], 2).tolist() != losses[0].tolist()
    wanted = {"groups": (0,)}
    replies = [asked(own, chosen, EVALUATE, **wanted) for own in (exact, rounded)]
    metrics = learner_of(chosen, (2,), CLASSES).problem.metrics
    (full, few) = (EvaluateReply.unpack(reply, metrics) for reply in replies)
    assert full.pooled
    assert (few.pooled, few.pooled_sites) == ({}, (0,))
    for name, values in full.figures.items():
        np.testing.assert_array_equal(few.figures[name], np.round(values, 2))


def test_a_file_beside_the_data_holds_it_and_the_config_overrules(tmp_path: Path) -> None:
    own = config(tmp_path)
    assert policy_of(own) == Policy()
    (tmp_path / FILE).write_text('min_test = 60\nmetrics = "rounded"\n')
    assert policy_of(own) == Policy(min_test=60, metrics="rounded")
    assert policy_of({**own, "min_test": 3}) == Policy(min_test=3, metrics="rounded")
    assert policy_of({"partition-id": 0, "num-partitions": 1}) is None
    assert failure(asked(own, experiment(tmp_path), EVALUATE)) == "beyond-policy"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("min_tests = 4", 'there is no key "min_tests" in a policy'),
        ("min_test = -1", "must be a whole number of at least 0"),
        ("min_test = true", "must be a whole number"),
        ('min_test = "4"', "must be a whole number"),
        ('metrics = "none"', 'must be "exact" or "rounded"'),
        ("[", "not a policy"),
    ],
)
def test_a_policy_that_is_none_is_named_and_nothing_is_answered(text: str, words: str, tmp_path: Path) -> None:
    own = config(tmp_path)
    (tmp_path / FILE).write_text(text)
    with pytest.raises(FedmetaError, match=words) as error:
        policy_of(own)
    assert str(tmp_path / FILE) in str(error.value)
    assert failure(asked(own, experiment(tmp_path), TRAIN)) == "bad-experiment"


def test_a_node_without_data_reads_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chosen = experiment(tmp_path, "data.source=tables", f"data.path={tmp_path}")
    hospital(tmp_path, "abbey", rows=100)
    grid = SeveralNodes(app, chosen, node_configs=[{"site": "abbey"}])
    assert failure(ask(grid, QUERY_SITES, RecordDict())) == "bad-data"
    assert "node config: data is missing" in caplog.text


def test_where_state_lies_is_the_sites_to_say(tmp_path: Path) -> None:
    chosen = experiment(tmp_path, "learner.name=ditto", f"tracking.folder={tmp_path / 'elsewhere'}")
    own = config(tmp_path)
    del own["state"]
    assert failure(asked(own, chosen, TRAIN)) == "bad-storage"
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("run", ["", ".", "..", "../x", "a/b", "/tmp/x", "a\\b", "a\0b", "-a", "a" * 200, "ä"])
def test_a_runs_name_is_one_part_of_a_path(run: str, tmp_path: Path) -> None:
    chosen = experiment(tmp_path, "learner.name=ditto")
    assert failure(asked(config(tmp_path), chosen, TRAIN, run=run)) == "bad-message"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["abbey.csv"]
