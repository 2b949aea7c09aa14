"""A federation in time, from the keys of [stream] to the summary."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedmeta
from clients.stream import Memory, losses_of_rows
from fedmeta import tables
from fedmeta.data import evaluation_episodes, load, training_episodes
from fedmeta.data.stream_split import StreamSplit, step_of, stream_split
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment, Stream
from fedmeta.messages import EvaluateReply, MessageError, RoundRequest
from tests.stream.made import settings, switching


def experiment(folder: Path, *more: str) -> Experiment:
    path = switching(folder / "sites.npz") if not (folder / "sites.npz").exists() else folder / "sites.npz"
    return Experiment().with_overrides(settings(path, folder / "runs", *more))


def rows_of(folder: Path, *more: str) -> StreamSplit:
    described = experiment(folder, *more)
    return stream_split(load(described.data), described)


def places(split: StreamSplit, rows: Any, site: int) -> list[int]:
    own = split.population.rows(split.population.all_sites).of(site).tolist()
    return [own.index(row) for row in rows.of(site).tolist()]


@pytest.mark.parametrize(
    ("memory", "first"), [("memory=all", [0, 0, 0]), ("memory=window", [0, 10, 30]), ("memory=discount", [0, 0, 0])]
)
def test_each_block_tests_and_then_joins(tmp_path: Path, memory: str, first: list[int]) -> None:
    split = rows_of(tmp_path, f"stream.{memory}", "stream.window=30")
    sites = split.population.all_sites
    for step, start in enumerate(first):
        here = replace(split, step=step)
        so_far = 20 * (step + 1)
        assert places(here, here.train_rows(sites), 1) == list(range(start, so_far))
        assert places(here, here.test_rows(sites), 1) == list(range(so_far, so_far + 20))
        assert here.train_sizes(sites).tolist() == [so_far - start] * 6
    end = replace(split, step=5)
    assert end.test_sizes(sites).tolist() == [0] * 6
    assert end.train_sizes(sites).tolist() == [120 if memory != "memory=window" else 30] * 6
    assert [own.tolist() for own in split.joining_sizes(sites)] == [[20] * 6, [100] * 6]


def test_no_row_of_a_later_block_is_drawn_before_it_joined(tmp_path: Path) -> None:
    for memory in ("all", "window", "discount"):
        split = replace(rows_of(tmp_path, f"stream.memory={memory}"), step=1)
        sites = split.population.all_sites
        late = set(split.population.rows(sites).rows.tolist()) - set(split.train_rows(sites).rows.tolist())
        for number in range(1, 30):
            drawn = training_episodes(split, sites, number, 20, 20)
            assert not late & set(
                np.concatenate([drawn.support.rows[drawn.support.mask], drawn.query.rows[drawn.query.mask]]).tolist()
            )
        scored = evaluation_episodes(split, sites, 20)
        assert not late & set(scored.support.rows[scored.support.mask].tolist())
        assert set(scored.query.rows[scored.query.mask].tolist()) == set(split.test_rows(sites).rows.tolist())


def test_at_most_half_of_what_is_there_is_support_in_training(tmp_path: Path) -> None:
    split = rows_of(tmp_path)
    for step, support in ((0, 10), (1, 20), (2, 25)):
        drawn = training_episodes(replace(split, step=step), split.population.all_sites, 1, 25, 20)
        assert drawn.support.mask.sum(1).tolist() == [support] * 6
        assert drawn.query.mask.sum(1).tolist() == [min(20, 20 * (step + 1) - support)] * 6
    scored = evaluation_episodes(replace(split, step=1), split.population.all_sites, 400)
    assert scored.support.mask.sum(1).tolist() == [40] * 6


def test_discount_draws_a_row_half_as_often_after_its_half_life(tmp_path: Path) -> None:
    split = replace(rows_of(tmp_path, "stream.memory=discount", "stream.half_life=20"), step=4)  # 100 rows
    sites = split.population.all_sites
    counts = np.zeros(100)
    own = split.population.rows(sites)
    for number in range(1, 1500):
        drawn = training_episodes(split, sites, number, 1, 1).support.rows[:, 0]
        for site in range(6):
            counts[own.of(site).tolist().index(drawn[site])] += 1
    newest, older = counts[80:].sum(), counts[60:80].sum()
    assert older / newest == pytest.approx(0.5, abs=0.05)


def test_the_alarm_of_a_site_forgets_what_was_before_the_change() -> None:
    draw = np.random.default_rng(0)
    memory, rows = Memory(np.empty(0), 20), []
    for block in range(12):
        low = block < 7
        memory, row = memory.after(draw.exponential(1.0 if low else 9.0, 20), 0.01, 5)
        rows.append(row)
    assert rows[:7] == [-1] * 7
    went_off = [row for row in rows if row >= 0]
    assert len(went_off) == 1
    assert 160 <= went_off[0] < 200
    assert abs(memory.since - 160) <= 5
    assert memory.starts[:8] == (0,) * 8
    assert memory.starts[-1] == memory.since
    again = Memory.of(memory.tensors(), 20)
    assert again.losses.tolist() == memory.losses.tolist()
    assert replace(again, losses=memory.losses) == memory


def test_losses_of_rows_are_those_of_the_problem() -> None:
    logits = torch.randn(7, 3, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 2, 1, 0, 0])
    mask = np.array([1.0, 1, 1, 0, 1, 1, 1])
    found = losses_of_rows(logits.numpy(), y.numpy(), mask)
    wanted = torch.nn.functional.cross_entropy(logits, y, reduction="none").numpy()[mask > 0]
    assert found == pytest.approx(wanted)
    assert np.isinf(losses_of_rows(logits.numpy(), np.array([-1] * 7), mask)).all()


@pytest.mark.slow
def test_a_run_in_time_forgets_at_the_alarm_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    more = ("stream.memory=alarm", "stream.rate=0.05", "learner.inner_lr=0.1")
    whole = fedmeta.run(experiment(tmp_path, *more))
    found = whole.summary["stream"]
    assert found["blocks"] == 5
    assert [len(found[group]["loss"]) for group in ("new_sites", "training_sites")] == [5, 5]
    assert found["new_sites"]["sites"] == [2] * 5
    assert found["alarms"], "a slope that turns round goes unnoticed"
    assert all(alarm["row"] >= 60 for alarm in found["alarms"])
    for group in ("new_sites", "training_sites"):
        own = found[group]
        beyond = sum(a - b for a, b in zip(own["loss"], own["hindsight_loss"], strict=True))
        assert own["regret"] == pytest.approx(beyond)
    assert whole.sites["rows"].tolist() == [100] * 6
    assert whole.sites["test_rows"].tolist() == [20] * 6

    def stop(progress: Any) -> None:
        if progress.round_number == 10:
            raise KeyboardInterrupt

    described = experiment(tmp_path, *more, f"tracking.folder={tmp_path / 'broken'}")
    with pytest.raises(KeyboardInterrupt):
        fedmeta.run(described, report=stop)
    resumed = fedmeta.run(described, resume="auto")
    assert resumed.summary["stream"] == found
    for name, value in whole.meta_state.items():
        assert torch.equal(value, resumed.meta_state[name]), name


@pytest.mark.slow
def test_a_start_that_learned_from_the_first_block_alone_stays_as_it_is(tmp_path: Path) -> None:
    fixed = fedmeta.run(experiment(tmp_path, "stream.learn=1", "stream.hindsight=false"))
    short = fedmeta.run(experiment(tmp_path, "server.rounds=3", "stream.hindsight=false"))
    for name, value in short.meta_state.items():
        assert torch.equal(value, fixed.meta_state[name]), name
    assert "regret" not in fixed.summary["stream"]["new_sites"]
    assert fixed.summary["stream"]["blocks"] == 5


REFUSED = {
    "too many rounds": (["server.rounds=18"], r"need 6 blocks, and the longest site has 5 .*rounds to at most 15"),
    "blocks that leave nothing": (["stream.first=120"], r"the longest site has 0"),
    "rows at random": (["data.split=random"], r'needs data.split = "time"'),
    "no evaluations": (["evaluation.every=0"], r"needs evaluation.every above 0"),
    "patience": (["evaluation.patience=1"], r"each one of a stream is of other rows"),
    "secure sums": (["privacy.secure_aggregation=true"], r"does not know how many rows"),
    "epochs of a discount": (["learner.name=fedavg", "stream.memory=discount"], r"takes all rows of a site in epochs"),
}


@pytest.mark.parametrize(("keys", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_in_time_is_refused_with_the_reason(tmp_path: Path, keys: list[str], message: str) -> None:
    with pytest.raises(FedmetaError, match=message):
        fedmeta.run(experiment(tmp_path, *keys))
    assert not (tmp_path / "runs").exists()


def test_steps_follow_the_evaluations() -> None:
    assert [step_of(number, 3) for number in (0, 1, 3, 4, 6, 7)] == [0, 0, 0, 1, 1, 2]
    assert Stream(block=5).first_rows == 5
    assert Stream(block=5, first=9).first_rows == 9


def evaluated(**changes: Any) -> EvaluateReply:
    figures = {"loss": np.ones((2, 2)), "rmse": np.ones((2, 2))}
    return EvaluateReply(**({"names": ("a", "b"), "figures": figures, "chosen": np.array([1, 1])} | changes))


def test_messages_name_blocks_and_alarms_only_where_there_are_some() -> None:
    reply = evaluated(alarms=(-1, 77))
    assert EvaluateReply.unpack(reply.pack()).alarms == (-1, 77)
    assert "alarms" not in evaluated().pack()["counts"]
    assert reply.without({"a"}).alarms == (77,)
    request = RoundRequest(meta_state={}, round_number=6, classes=(), names=("a",), run="run")
    assert RoundRequest.unpack(replace(request, block=3).pack()).block == 3
    assert "block" not in request.pack()["task"]
    for content in (evaluated(alarms=(-2, 0)).pack(), evaluated(alarms=(1 << 41, 0)).pack()):
        with pytest.raises(MessageError, match="alarms"):
            EvaluateReply.unpack(content)
    with pytest.raises(MessageError):
        EvaluateReply.unpack(evaluated(alarms=(1,)).pack())


def test_what_a_stream_came_to_is_shown_by_block() -> None:
    none = {"sites": [0, 0], "global": [None, None], "personalized": [None, None], "mean": {}, "regret": None}
    own = {"sites": [2, 1], "global": [0.5, 0.25], "personalized": [0.75, None], "regret": 0.125}
    own["mean"] = {"global": 0.4, "personalized": 0.75}
    alarms = [{"site": "a", "step": 1, "row": 30}]
    found = {"block": 20, "blocks": 2, "memory": "alarm", "alarms": alarms, "new_sites": own, "training_sites": none}
    summary = {"score": {"name": "accuracy"}, "stream": found}
    table = tables.stream_table(summary)
    assert table is not None
    assert table.headings == ("block", "new sites: n", "global", "personalized")
    assert table.rows == [("1", 2, 0.5, 0.75), ("2", 1, 0.25, None)]
    line, alarmed = tables.stream_lines(summary)
    assert "accuracy 0.400 not adapted, 0.750 adapted; regret 0.125" in line
    assert alarmed == "alarms: 1, at 1 of the sites"
    assert tables.stream_table({"score": {"name": "accuracy"}}) is None
    assert tables.stream_lines({}) == []
