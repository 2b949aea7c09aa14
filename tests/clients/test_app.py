import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from ray import cloudpickle

from clients import app as module
from clients.app import CODES, app
from clients.node import node_of
from fedmeta.build import learner_of
from fedmeta.data import FeatureSums, Standardisation, gram, gram_matrices, standardisation, standardised
from fedmeta.experiment import Experiment
from fedmeta.messages import (
    EVALUATE,
    FAILURES,
    QUERY_SITES,
    QUERY_SUMS,
    TRAIN,
    EvaluateReply,
    RoundRequest,
    SitesReply,
    SumsReply,
    SumsRequest,
    TrainReply,
    failure,
)
from tests.server.digits import digits
from tests.server.hospitals import hospital, hospitals
from tests.several_nodes import NODE_IDS, SeveralNodes

SECRET = "63-years-male-diabetic"


def ask(grid: SeveralNodes, kind: str, content: RecordDict, node: int = NODE_IDS[0]) -> RecordDict:
    (reply,) = grid.send_and_receive([grid.create_message(content, kind, node, "1")])
    assert reply.has_content()
    return reply.content


def texts(content: RecordDict) -> str:
    return " ".join(str(dict(record)) for record in content.values())


def assert_only_a_code(content: RecordDict, code: str) -> None:
    assert {name: dict(record) for name, record in content.items()} == {"failure": {"code": code}}


# ---------------------------------------------------------------- who hosts what


def test_nodes_share_the_sites_and_say_alike_what_they_look_like(tmp_path: Path) -> None:
    grid = SeveralNodes(app, digits(tmp_path), 3)
    replies = [SitesReply.unpack(ask(grid, QUERY_SITES, RecordDict(), node)) for node in NODE_IDS[:3]]
    names = [name for reply in replies for name in reply.names]
    assert sorted(names) == [f"site-{number:02d}" for number in range(40)]
    assert [len(reply.names) for reply in replies] == [14, 13, 13]
    assert {reply.shape for reply in replies} == {(8, 8)}
    assert not any(reply.regression or reply.tokens for reply in replies)


def test_a_node_reports_the_labels_of_its_own_sites_only(tmp_path: Path) -> None:
    config = hospital(tmp_path, "abbey", classes=("ill",))
    grid = SeveralNodes(app, hospitals(tmp_path), node_configs=[config, hospital(tmp_path, "zion")])
    assert SitesReply.unpack(ask(grid, QUERY_SITES, RecordDict())).classes == ("ill",)


def test_a_nodes_sums_are_those_of_the_sites_asked_for(tmp_path: Path) -> None:
    experiment = digits(tmp_path)
    whole = SumsReply.unpack(ask(SeveralNodes(app, experiment, 1), QUERY_SUMS, SumsRequest(tuple(sites())).pack()))
    grid = SeveralNodes(app, experiment, 2)
    shares = [
        SumsReply.unpack(ask(grid, QUERY_SUMS, SumsRequest(tuple(sites()[part::2])).pack(), NODE_IDS[part]))
        for part in range(2)
    ]
    assert np.array_equal(whole.count, shares[0].count + shares[1].count)
    assert np.allclose(whole.total, shares[0].total + shares[1].total, rtol=1e-14)


def sites() -> list[str]:
    return [f"site-{number:02d}" for number in range(40)]


# ---------------------------------------------------------------- what a node works out


def request(experiment: Experiment, names: tuple[str, ...], **more: Any) -> RoundRequest:
    classes = tuple(str(digit) for digit in range(10))
    state = learner_of(experiment, (8, 8), tuple("0123456789")).init(0)
    scale = {"standardisation.mean": torch.zeros(1, 1), "standardisation.scale": torch.full((1, 1), 8.0)}
    settings = {"round_number": 1, "run": "a-run", "steps": 2, "engine": "vmap", **more}
    return RoundRequest({**state, **scale}, classes=classes, names=names, **settings)


def test_a_nodes_gradient_is_the_sum_over_its_sites(tmp_path: Path) -> None:
    experiment = digits(tmp_path, "model.dtype=float64")
    grid = SeveralNodes(app, experiment, 1)
    like = request(experiment, ()).meta_state
    like = {key: value for key, value in like.items() if not key.startswith("standardisation")}
    names = ("site-02", "site-05", "site-17")

    def gradient(chosen: tuple[str, ...]) -> TrainReply:
        return TrainReply.unpack(ask(grid, TRAIN, request(experiment, chosen).pack()), like)

    whole, parts = gradient(names), [gradient((name,)) for name in names]
    assert whole.weight == 3.0
    assert whole.finite.tolist() == [True] * 3
    assert np.allclose(whole.query_loss, np.concatenate([part.query_loss for part in parts]), rtol=1e-12)
    for key, value in whole.gradient.items():
        assert torch.allclose(value, sum(part.gradient[key] for part in parts), rtol=1e-10, atol=1e-14)


def test_a_node_that_hosts_a_share_keeps_no_copy_of_all_rows(tmp_path: Path) -> None:
    experiment = digits(tmp_path)
    for nodes, kept in ((2, 0), (1, 1)):
        standardised.cache_clear()
        content = ask(SeveralNodes(app, experiment, nodes), TRAIN, request(experiment, ("site-02",)).pack())
        assert failure(content) is None
        assert standardised.cache_info().currsize == kept


def test_a_node_that_hosts_all_sites_knows_their_rows_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "WIDE", 64)
    known = {}
    for model in ("mlp", "logistic", "cnn"):
        for nodes in (1, 2):
            gram_matrices.cache_clear()
            grid = SeveralNodes(app, digits(tmp_path, f"model.name={model}"), nodes)
            node = node_of(next(iter(grid.contexts.values())))
            scale = Standardisation(np.ones(1, np.float32), np.full(1, 2, np.float32))
            batch = node.training_batch(node.hosted[:2], 1, scale, node.population.class_names)
            known[model, nodes] = batch.pairs is not None
    assert known == {(model, nodes): nodes == 1 and model != "cnn" for model, nodes in known}


def test_scores_start_before_adaptation_and_end_after_it(tmp_path: Path) -> None:
    experiment = digits(tmp_path)
    grid = SeveralNodes(app, experiment, 1)
    names = ("site-02", "site-05")
    for steps in (0, 1, 4):
        reply = EvaluateReply.unpack(ask(grid, EVALUATE, request(experiment, names, steps=steps).pack()))
        assert reply.names == names
        scores, losses = reply.figures["accuracy"], reply.figures["loss"]
        assert scores.shape == losses.shape == (2, steps + 1)
        assert ((scores >= 0) & (scores <= 1)).all()
    assert (losses[:, -1] < losses[:, 0]).all()


# ---------------------------------------------------------------- what does not leave


def test_a_cell_that_cannot_be_read_does_not_leave_its_site(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = hospital(tmp_path, "abbey")
    path = Path(config["data"])
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], f"{SECRET},1.0,ill", *lines[5:]]) + "\n")
    grid = SeveralNodes(app, hospitals(tmp_path), node_configs=[config])
    with caplog.at_level(logging.ERROR, logger="fedmeta.client"):
        reply = ask(grid, QUERY_SITES, RecordDict())
    assert_only_a_code(reply, "bad-data")
    # The operator's own log has all of it.
    assert SECRET in caplog.text
    assert "abbey.csv" in caplog.text


def test_the_path_of_a_missing_file_does_not_leave_its_site(tmp_path: Path) -> None:
    grid = SeveralNodes(app, hospitals(tmp_path), node_configs=[{"site": "abbey", "data": f"/secret/{SECRET}.csv"}])
    assert_only_a_code(ask(grid, QUERY_SITES, RecordDict()), "bad-data")


def test_a_disk_that_does_not_take_what_a_site_keeps_is_reported_by_a_code(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "full").touch()
    config = {**hospital(tmp_path, "abbey"), "state": str(tmp_path / "full")}
    experiment = hospitals(tmp_path, "learner.name=fedrep", "model.name=mlp")
    grid = SeveralNodes(app, experiment, node_configs=[config])
    shown = SitesReply.unpack(ask(grid, QUERY_SITES, RecordDict()))
    sums = SumsReply.unpack(ask(grid, QUERY_SUMS, SumsRequest(shown.names).pack()))
    scale = standardisation(FeatureSums(sums.count, sums.total, sums.square))
    learner = learner_of(experiment, shown.shape, shown.classes)
    constants = {"standardisation.mean": scale.mean, "standardisation.scale": scale.scale}
    state = learner.init(0) | {name: torch.from_numpy(value) for name, value in constants.items()}
    reply = ask(grid, TRAIN, RoundRequest(state, 1, shown.classes, shown.names, "a-run").pack())
    assert_only_a_code(reply, "bad-storage")
    assert "Traceback" not in caplog.text
    assert "requests.json: requests cannot be counted: File exists" in caplog.text


def test_a_site_of_another_node_is_not_known(tmp_path: Path) -> None:
    experiment = digits(tmp_path)
    grid = SeveralNodes(app, experiment, 2)
    for names in (("site-01",), ("site-00", "site-01"), ("nowhere",), ("site-39",)):
        assert_only_a_code(ask(grid, TRAIN, request(experiment, names).pack()), "unknown-site")
        assert_only_a_code(ask(grid, QUERY_SUMS, SumsRequest(names).pack()), "unknown-site")


@pytest.mark.parametrize("kind", [QUERY_SUMS, TRAIN, EVALUATE])
def test_a_message_that_is_none_is_answered_with_a_code(tmp_path: Path, kind: str) -> None:
    grid = SeveralNodes(app, digits(tmp_path), 1)
    assert_only_a_code(ask(grid, kind, RecordDict()), "bad-message")
    assert_only_a_code(ask(grid, kind, RecordDict({"sites": ConfigRecord({"names": [1]})})), "bad-message")


def test_an_experiment_that_is_none_is_answered_with_a_code(tmp_path: Path) -> None:
    grid = SeveralNodes(app, digits(tmp_path), 1)
    grid.contexts[NODE_IDS[0]].run_config["experiment"] = f'[learner]\nname = "{SECRET}"'
    assert_only_a_code(ask(grid, QUERY_SITES, RecordDict()), "bad-experiment")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(SECRET), "out-of-memory"),
        (RuntimeError(SECRET), "internal"),
        (KeyError(SECRET), "internal"),
        (AssertionError(SECRET), "internal"),
        (UnicodeDecodeError("utf-8", SECRET.encode(), 0, 1, SECRET), "internal"),
        (np.linalg.LinAlgError(SECRET), "internal"),
        (torch.OutOfMemoryError(SECRET), "out-of-memory"),
    ],
)
def test_the_text_of_no_error_leaves_its_site(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, code: str
) -> None:
    def fails(*arguments: object, **settings: object) -> None:
        raise error

    experiment = digits(tmp_path)
    grid = SeveralNodes(app, experiment, 1)
    monkeypatch.setattr(module.engines, "meta_gradients", fails)
    reply = ask(grid, TRAIN, request(experiment, ("site-00",)).pack())
    assert_only_a_code(reply, code)
    assert SECRET not in texts(reply)


def test_every_code_is_one_that_the_server_knows() -> None:
    assert set(CODES.values()) == set(FAILURES)
    assert list(CODES)[-1] is Exception


def test_a_node_that_failed_once_answers_the_next_time(tmp_path: Path) -> None:
    grid = SeveralNodes(app, digits(tmp_path), 1)
    assert failure(ask(grid, TRAIN, RecordDict())) == "bad-message"
    assert failure(ask(grid, QUERY_SITES, RecordDict())) is None


def test_rays_workers_are_sent_names_and_no_code() -> None:
    for handler in app._registered_funcs.values():
        assert cloudpickle.loads(cloudpickle.dumps(handler)) is handler
    assert len(cloudpickle.dumps(app)) < 2000
