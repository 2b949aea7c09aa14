import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from flwr.app import Message

from clients.app import app
from fedmeta import checkpoint
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.messages import payload_bytes
from fedmeta.progress import Progress, ignore_progress
from fedmeta.runtime import run
from fedmeta.tracking.mlflow_client import open_client
from server import membership, training_loop
from server.signals import defer_keyboard_interrupt
from tests.server.digits import digits
from tests.server.hospitals import hospital, hospitals
from tests.several_nodes import NODE_IDS, SeveralNodes, silence

CLOCK = ("wall_s", "run_id", "checkpoint")


def stop_after(number: int) -> Any:
    """Returns a report that does what Ctrl-C does, once a round is over."""

    def report(progress: Progress) -> None:
        if progress.round_number == number and not progress.note:
            raise KeyboardInterrupt

    return report


def only_folder(experiment: Experiment) -> Path:
    (folder,) = Path(experiment.tracking.folder).iterdir()
    return folder


def assert_same(one: training_loop.Outcome | Any, other: training_loop.Outcome | Any) -> None:
    """Checks two finished runs for the same bits."""
    assert one.meta_state.keys() == other.meta_state.keys()
    assert all(torch.equal(value, other.meta_state[key]) for key, value in one.meta_state.items())
    columns = {key: value for key, value in one.summary.items() if key not in CLOCK}
    assert columns == {key: value for key, value in other.summary.items() if key not in CLOCK}


# ---------------------------------------------------------------- a run from start to end


@pytest.mark.quick("3-4-*")
@pytest.mark.parametrize(
    ("every", "total", "evaluated"), [(2, 4, [0, 2, 4]), (3, 4, [0, 3, 4]), (0, 3, [3]), (9, 2, [0, 2]), (1, 0, [0])]
)
def test_sites_are_evaluated_at_the_start_every_so_often_and_at_the_end(
    tmp_path: Path, every: int, total: int, evaluated: list[int]
) -> None:
    result = run(digits(tmp_path, f"evaluation.every={every}", f"server.rounds={total}"))
    assert result.history["round"].unique().tolist() == evaluated
    assert (result.history.groupby("round")["site"].nunique() == 40).all()
    assert result.summary["rounds"] == total
    assert result.sites["round"].unique().tolist() == [total]


@pytest.mark.slow
def test_progress_is_reported_round_by_round(tmp_path: Path) -> None:
    reported: list[Progress] = []
    result = run(digits(tmp_path), report=reported.append)
    assert [progress.round_number for progress in reported] == sorted(progress.round_number for progress in reported)
    assert {progress.round_number for progress in reported} == {0, 1, 2, 3, 4}
    assert reported[-1].global_score == result.summary["new_sites"]["global"]["mean"]
    assert reported[-1].personalized_score == result.summary["new_sites"]["personalized"]["mean"]
    assert {progress.run_id for progress in reported} == {result.summary["run_id"]}


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path: Path) -> None:
    one, same, other = (run(digits(tmp_path, f"runtime.seed={seed}")) for seed in (1, 1, 2))
    assert_same(one, same)
    assert not torch.equal(one.meta_state["theta.1.weight"], other.meta_state["theta.1.weight"])


@pytest.mark.slow
def test_the_summary_counts_what_travelled(tmp_path: Path) -> None:
    grid = SeveralNodes(app, digits(tmp_path), 3)
    outcome = training_loop.run(grid, grid.experiment, ignore_progress)
    work = [message for message in grid.sent if message.metadata.message_type in ("train", "evaluate")]
    # Flower counts no empty list or text, such as the groups of a message that asks for no pooled figures.
    full = (r for message in work for r in message.content.values() if all(v not in ([], "") for v in r.values()))
    assert sum(record.count_bytes() for record in full) < sum(payload_bytes(message.content) for message in work)
    sent = sum(payload_bytes(message.content) for message in work)
    assert outcome.summary["bytes_down"] == sent
    assert outcome.summary["bytes_up"] > 0
    assert outcome.summary["failures"] == 0


# ---------------------------------------------------------------- faults


@pytest.mark.slow
def test_a_skipped_round_is_reported_and_the_run_continues(tmp_path: Path) -> None:
    grid = SeveralNodes(app, digits(tmp_path), 2)
    reported: list[Progress] = []

    def silent_in_round_2(message: Message, reply: Message) -> Message | None:
        is_it = message.metadata.message_type == "train" and message.metadata.group_id == "2"
        return None if is_it else reply

    grid.faults = dict.fromkeys(NODE_IDS, silent_in_round_2)
    outcome = training_loop.run(grid, grid.experiment, reported.append)
    notes = [progress.note for progress in reported if progress.note]
    assert len(notes) == 1
    assert notes[0].startswith("round 2 skipped: site-")
    assert notes[0].endswith("(and 7 more): no reply in time")
    assert outcome.summary["rounds"] == 4
    assert outcome.summary["failures"] == 8


def test_a_run_that_diverges_ends_with_what_may_help(tmp_path: Path) -> None:
    experiment = digits(tmp_path, "server.rounds=50", "evaluation.every=0", "learner.inner_lr=1e30")
    with pytest.raises(FedmetaError, match=r"was not finite\. Smaller rates may help: learner\.inner_lr, server\.lr$"):
        training_loop.run(SeveralNodes(app, experiment, 2), experiment, ignore_progress)


@pytest.mark.slow
def test_what_fails_again_and_again_is_reported_ten_times_and_what_is_new_always(tmp_path: Path) -> None:
    experiment = digits(tmp_path, "server.rounds=20", "server.sites_per_round=0", "evaluation.every=0")
    grid = SeveralNodes(app, experiment, 2)
    one, other = NODE_IDS[:2]

    def late(*numbers: int) -> Any:
        def fault(message: Message, reply: Message) -> Message | None:
            is_it = message.metadata.message_type == "train" and int(message.metadata.group_id) in numbers
            return None if is_it else reply

        return fault

    grid.faults = {one: late(*range(1, 21)), other: late(17)}
    reported: list[Progress] = []
    training_loop.run(grid, experiment, reported.append)
    notes = [progress.note for progress in reported if progress.note]
    assert [note.split()[1] for note in notes] == [str(number) for number in (*range(1, 12), 17)]
    assert notes[10].endswith("see failures.json")
    assert notes[11].startswith("round 17 skipped: ")


def test_ten_rounds_without_a_usable_reply_stop_the_run_with_the_reason(tmp_path: Path) -> None:
    experiment = digits(tmp_path, "server.rounds=50", "evaluation.every=0", "runtime.checkpoint_every=1")
    grid = SeveralNodes(app, experiment, 2)

    def never_trains(message: Message, reply: Message) -> Message | None:
        return None if message.metadata.message_type == "train" else reply

    grid.faults = dict.fromkeys(NODE_IDS, never_trains)
    with pytest.raises(
        FedmetaError, match=r"^none of 10 rounds had a usable reply: site-\d\d \(and 7 more\): no reply"
    ):
        training_loop.run(grid, experiment, ignore_progress)
    trained = [message.metadata.group_id for message in grid.sent if message.metadata.message_type == "train"]
    assert set(trained) == {str(number) for number in range(1, 11)}


@pytest.mark.slow
def test_one_usable_reply_in_ten_rounds_is_enough_to_continue(tmp_path: Path) -> None:
    experiment = digits(tmp_path, "server.rounds=20", "evaluation.every=0")
    grid = SeveralNodes(app, experiment, 2)

    def rarely_trains(message: Message, reply: Message) -> Message | None:
        rare = message.metadata.message_type != "train" or message.metadata.group_id in ("9", "18")
        return reply if rare else None

    grid.faults = dict.fromkeys(NODE_IDS, rarely_trains)
    assert training_loop.run(grid, experiment, ignore_progress).summary["rounds"] == 20


@pytest.mark.slow
def test_a_node_that_is_lost_for_good_leaves_its_sites_unevaluated(tmp_path: Path) -> None:
    grid = SeveralNodes(app, digits(tmp_path), 4)

    def lost_later(message: Message, reply: Message) -> Message | None:
        kind, number = message.metadata.message_type, int(message.metadata.group_id)
        return silence(message, reply) if kind in ("train", "evaluate") and number >= 2 else reply

    grid.faults[NODE_IDS[3]] = lost_later
    outcome = training_loop.run(grid, grid.experiment, ignore_progress)
    assert outcome.sites.groupby("round")["site"].nunique().tolist() == [40, 30, 30]
    assert outcome.summary["new_sites"]["n"] + outcome.summary["training_sites"]["n"] == 30


def test_a_run_whose_sites_cannot_be_evaluated_keeps_its_meta_state(tmp_path: Path) -> None:
    grid = SeveralNodes(app, digits(tmp_path, "evaluation.every=0"), 2)

    def never_evaluates(message: Message, reply: Message) -> Message | None:
        return None if message.metadata.message_type == "evaluate" else reply

    grid.faults = dict.fromkeys(NODE_IDS, never_evaluates)
    with pytest.raises(FedmetaError, match="no site could be evaluated at the end of the run"):
        training_loop.run(grid, grid.experiment, ignore_progress)


# ---------------------------------------------------------------- sites that come and go


@pytest.mark.slow
def test_a_site_that_joins_late_does_not_move_the_scores_of_others(tmp_path: Path) -> None:
    experiment = hospitals(tmp_path, "server.rounds=4", "evaluation.every=1")
    configs = [hospital(tmp_path, name, rows) for name, rows in (("mercy", 12), ("zion", 20))]
    grid = SeveralNodes(app, experiment, node_configs=configs)
    alone = training_loop.run(SeveralNodes(app, experiment, node_configs=configs), experiment, ignore_progress)

    def joins_after_round_2(progress: Progress) -> None:
        if progress.round_number == 2 and NODE_IDS[4] not in grid.contexts:
            grid.join(NODE_IDS[4], hospital(tmp_path, "abbey", 30))

    outcome = training_loop.run(grid, experiment, joins_after_round_2)
    sites = outcome.sites.groupby("round")["site"].agg(list).to_dict()
    assert sites == {number: (["abbey"] * (number > 2)) + ["mercy", "zion"] for number in range(5)}
    before = outcome.sites[outcome.sites["site"] != "abbey"].reset_index(drop=True)
    pd.testing.assert_frame_equal(before, alone.sites)
    assert outcome.sites[outcome.sites["site"] == "abbey"]["kind"].unique().tolist() == ["new"]
    saved, _ = checkpoint.newest(outcome.folder)
    assert saved.names == ("abbey", "mercy", "zion")
    assert [saved.names[site] for site in saved.evaluations[0].sites] == ["mercy", "zion"]


def test_a_site_that_joins_between_two_parts_of_a_run_is_new(tmp_path: Path) -> None:
    experiment = hospitals(tmp_path, "server.rounds=4", "evaluation.every=1", "data.new_sites=1")
    configs = [hospital(tmp_path, name, rows) for name, rows in (("mercy", 12), ("zion", 20), ("hope", 16))]
    with pytest.raises(KeyboardInterrupt):
        training_loop.run(SeveralNodes(app, experiment, node_configs=configs), experiment, stop_after(2))
    folder = only_folder(experiment)
    new = checkpoint.newest(folder)[0].new_sites
    grid = SeveralNodes(app, experiment, node_configs=[*configs, hospital(tmp_path, "abbey", 30)])
    outcome = training_loop.run(grid, experiment, ignore_progress, folder)
    last = outcome.sites[outcome.sites["round"] == 4].set_index("site")["kind"]
    assert last.index.tolist() == ["abbey", "hope", "mercy", "zion"]
    assert set(last.index[last == "new"]) == {"abbey", *new}
    first = outcome.sites[outcome.sites["round"] == 0].set_index("site")["test_rows"]
    assert first.to_dict() == {"hope": 8, "mercy": 6, "zion": 10}


@pytest.mark.slow
def test_a_resumed_run_waits_for_all_its_sites_and_continues_without_the_lost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(membership, "POLL_S", 0.01)
    rules = ("server.rounds=5", "server.round_timeout=0.1", "evaluation.every=2", "data.new_sites=1")
    configs = [hospital(tmp_path, name, rows) for name, rows in (("mercy", 12), ("zion", 20), ("hope", 16))]

    def without_hope_from_round_2(grid: SeveralNodes, then: Any = ignore_progress) -> Any:
        def report(progress: Progress) -> None:
            if progress.round_number == 1:
                grid.faults[NODE_IDS[2]] = silence
            then(progress)

        return report

    experiment = hospitals(tmp_path / "unbroken", *rules)
    grid = SeveralNodes(app, experiment, node_configs=configs)
    unbroken = training_loop.run(grid, experiment, without_hope_from_round_2(grid))
    experiment = hospitals(tmp_path / "broken", *rules)
    grid = SeveralNodes(app, experiment, node_configs=configs)
    with pytest.raises(KeyboardInterrupt):
        training_loop.run(grid, experiment, without_hope_from_round_2(grid, stop_after(2)))
    folder, notes = only_folder(experiment), []
    grid = SeveralNodes(app, experiment, node_configs=configs[:2])

    def report(progress: Progress) -> None:
        notes.append(progress.note)
        if progress.round_number == 4 and NODE_IDS[4] not in grid.contexts:
            grid.join(NODE_IDS[4], configs[2])

    outcome = training_loop.run(grid, experiment, report, folder)
    lost = "it was not there, or refused, when the run was resumed"
    assert f"continues without hope: {lost}" in notes
    assert f"round 3 without hope: {lost}" in notes
    before = checkpoint.newest(Path(unbroken.folder))[0]
    after = checkpoint.newest(folder)[0]
    assert (after.names, after.new_sites, after.train_rows) == (before.names, before.new_sites, before.train_rows)
    # Back in round 5, the site is again what it was.
    last = outcome.sites[outcome.sites["round"] == 5].set_index("site")["kind"]
    assert last.index.tolist() == ["hope", "mercy", "zion"]
    assert set(last.index[last == "new"]) == set(before.new_sites)
    columns = ["round", "site", "kind", "personalized_loss", "global_loss"]
    pd.testing.assert_frame_equal(
        outcome.sites.loc[outcome.sites["round"] < 5, columns], unbroken.sites.loc[unbroken.sites["round"] < 5, columns]
    )


@pytest.mark.parametrize("wait_for", ['["zion"]', "2"])
def test_a_resumed_run_does_not_continue_without_whom_it_must_wait_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wait_for: str
) -> None:
    monkeypatch.setattr(membership, "POLL_S", 0.01)
    experiment = hospitals(tmp_path, "server.rounds=4", "server.round_timeout=0.05", f"server.wait_for={wait_for}")
    configs = [hospital(tmp_path, "mercy"), hospital(tmp_path, "zion")]
    with pytest.raises(KeyboardInterrupt):
        training_loop.run(SeveralNodes(app, experiment, node_configs=configs), experiment, stop_after(1))
    grid = SeveralNodes(app, experiment, node_configs=configs[:1])
    with pytest.raises(FedmetaError, match=r"still missing: (zion|1 more sites)"):
        training_loop.run(grid, experiment, ignore_progress, only_folder(experiment))


def test_a_resumed_run_refuses_sites_whose_columns_have_changed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(membership, "POLL_S", 0.01)
    experiment = hospitals(tmp_path, "server.rounds=4", "server.round_timeout=0.05")
    names = ("mercy", "zion", "hope")
    configs = [hospital(tmp_path, name) for name in names]
    with pytest.raises(KeyboardInterrupt):
        training_loop.run(SeveralNodes(app, experiment, node_configs=configs), experiment, stop_after(1))
    # Most have others now; what counts is the form that the run began with.
    (tmp_path / "later").mkdir()
    changed = [hospital(tmp_path / "later", name, columns=("age", "weight")) for name in names[1:]]
    outcome = training_loop.run(
        SeveralNodes(app, experiment, node_configs=[configs[0], *changed]),
        experiment,
        ignore_progress,
        only_folder(experiment),
    )
    assert outcome.sites["site"].tolist()[-1:] == ["mercy"]
    entries = json.loads((outcome.folder / "failures.json").read_text())
    shown = {entry["site"]: entry["reason"] for entry in entries if entry["what"] == "start"}
    assert shown == dict.fromkeys(names[1:], "columns too many: weight; columns missing: pressure")


# ---------------------------------------------------------------- stopped and resumed


@pytest.mark.quick("2-adam")
@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_run_that_was_stopped_and_resumed_is_the_unbroken_one(tmp_path: Path, after: int, optimizer: str) -> None:
    overrides = (f"server.optimizer={optimizer}", "server.lr=0.05")
    unbroken = run(digits(tmp_path / "unbroken", *overrides))
    experiment = digits(tmp_path / "broken", *overrides)
    with pytest.raises(KeyboardInterrupt):
        run(experiment, report=stop_after(after))
    resumed = run(experiment, resume="auto")
    assert_same(unbroken, resumed)
    pd.testing.assert_frame_equal(unbroken.history, resumed.history)
    assert resumed.folder == only_folder(experiment).absolute()


@pytest.mark.slow
def test_a_run_that_was_stopped_before_an_evaluation_resumes_with_it(tmp_path: Path) -> None:
    unbroken = run(digits(tmp_path / "unbroken"))
    experiment = digits(tmp_path / "broken")

    def interrupted_evaluation(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "evaluate" and message.metadata.group_id == "2":
            raise KeyboardInterrupt
        return reply

    grid = SeveralNodes(app, experiment, 1)
    grid.faults[NODE_IDS[0]] = interrupted_evaluation
    with pytest.raises(KeyboardInterrupt):
        training_loop.run(grid, experiment, ignore_progress)
    assert checkpoint.newest(only_folder(experiment))[0].round_number == 2
    resumed = run(experiment, resume="auto")
    assert_same(unbroken, resumed)
    pd.testing.assert_frame_equal(unbroken.history, resumed.history)


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_a_step_waits_for_its_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    unbroken = run(digits(tmp_path / "unbroken"))
    experiment = digits(tmp_path / "broken")
    step = torch.optim.Adam.step
    steps: list[int] = []

    def interrupted_step(self: torch.optim.Adam) -> None:
        steps.append(len(steps))
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", interrupted_step)
        with pytest.raises(KeyboardInterrupt):
            run(experiment)
    saved, _ = checkpoint.newest(only_folder(experiment))
    assert saved.round_number == 3
    assert set(saved.metrics) == {1, 2, 3}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_same(unbroken, run(experiment, resume="auto"))


def test_ctrl_c_that_is_ignored_stays_ignored_in_a_step() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with defer_keyboard_interrupt():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_a_finished_run_can_be_resumed_by_name_and_stays_as_it_is(tmp_path: Path) -> None:
    experiment = digits(tmp_path)
    first = run(experiment)
    again = run(experiment, resume=first.folder.name)
    assert_same(first, again)
    assert again.summary["run_id"] == first.summary["run_id"]
    with pytest.raises(FedmetaError, match="no unfinished run of this experiment"):
        run(experiment, resume="auto")


def kill_in_round(experiment: Experiment, number: int) -> None:
    """Runs an experiment in a separate process that is killed after a round: no handler, no flush, no goodbye."""

    def report(progress: Progress) -> None:
        if progress.round_number == number:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            run(experiment, report=report)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def test_a_killed_run_resumes_from_its_checkpoint_to_the_same_bits(tmp_path: Path) -> None:
    unbroken = run(digits(tmp_path / "unbroken", "server.rounds=7", "runtime.checkpoint_every=3"))
    experiment = digits(tmp_path / "killed", "server.rounds=7", "runtime.checkpoint_every=3")
    kill_in_round(experiment, 5)
    saved, _ = checkpoint.newest(only_folder(experiment))
    assert (saved.round_number, saved.finished) == (3, False)
    resumed = run(experiment, resume="auto")
    assert_same(unbroken, resumed)
    pd.testing.assert_frame_equal(unbroken.history, resumed.history)


@pytest.mark.slow
@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("learner", ["ditto", "fedrep"])
def test_what_sites_keep_goes_back_with_the_run_to_either_checkpoint(
    tmp_path: Path, learner: str, damaged: bool
) -> None:
    settings = (
        f"learner.name={learner}",
        "server.rounds=12",
        "server.sites_per_round=0",
        "runtime.checkpoint_every=4",
        "runtime.engine=vmap",
    )
    unbroken = run(digits(tmp_path / "unbroken", *settings))
    experiment = digits(tmp_path / "killed", *settings)
    kill_in_round(experiment, 11)
    saved, newest = checkpoint.newest(only_folder(experiment))
    assert saved.round_number == 8
    if damaged:
        newest.write_bytes(newest.read_bytes()[:-100])
    resumed = run(experiment, resume="auto")
    assert_same(unbroken, resumed)
    pd.testing.assert_frame_equal(unbroken.history, resumed.history)


@pytest.mark.slow
def test_a_run_that_was_killed_while_it_wrote_continues_from_the_checkpoint_before(tmp_path: Path) -> None:
    unbroken = run(digits(tmp_path / "unbroken", "server.rounds=7"))
    experiment = digits(tmp_path / "killed", "server.rounds=7", "runtime.checkpoint_every=2")
    kill_in_round(experiment, 5)
    newest = checkpoint.newest(only_folder(experiment))[1]
    newest.write_bytes(newest.read_bytes()[:-100])
    assert checkpoint.newest(only_folder(experiment))[0].round_number == 2
    assert_same(unbroken, run(experiment, resume="auto"))


KILLED = """
import os, signal, sys
from fedmeta.experiment import Experiment
from fedmeta.runtime import run

def report(progress):
    if progress.round_number == 5:
        os.kill(os.getpid(), signal.SIGKILL)

run(Experiment.from_toml(open(sys.argv[1]).read()), report=report)
"""


def metrics_of(experiment: Experiment, run_id: str) -> dict[str, list[tuple[int, float]]]:
    client = open_client(experiment.tracking.uri)
    names = client.get_run(run_id).data.metrics
    history = {name: client.get_metric_history(run_id, name) for name in names}
    return {name: sorted((metric.step, metric.value) for metric in metrics) for name, metrics in history.items()}


@pytest.mark.slow
def test_a_killed_run_tracks_every_round_once(tmp_path: Path) -> None:
    keys = ("server.rounds=7", "runtime.checkpoint_every=3", "tracking.site_curves=2")
    uri = f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}"
    unbroken, killed = (digits(tmp_path / name, uri, *keys) for name in ("unbroken", "killed"))
    expected = run(unbroken)
    (tmp_path / "killed.toml").write_text(killed.to_toml())
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed.toml")]
    repository = Path(__file__).parents[2]
    died = subprocess.run(command, cwd=repository, env={**os.environ, "PYTHONPATH": str(repository)}, check=False)
    assert died.returncode == -signal.SIGKILL
    folder = only_folder(killed)
    saved, _ = checkpoint.newest(folder)
    assert (saved.round_number, saved.finished) == (3, False)
    resumed = run(killed, resume="auto")
    assert_same(expected, resumed)
    assert resumed.summary["run_id"] == saved.run_id
    metrics = metrics_of(killed, saved.run_id)
    for name, history in metrics_of(unbroken, expected.summary["run_id"]).items():
        steps = [step for step, _ in history]
        assert [step for step, _ in metrics[name]] == steps == sorted(set(steps)), name
        if not name.startswith(("time/", "system/", "final/")):
            assert metrics[name] == history, name
    assert [step for step, _ in metrics["train/query_loss"]] == list(range(1, 8))


@pytest.mark.slow
def test_evaluations_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    result = run(digits(tmp_path))
    saved, _ = checkpoint.newest(result.folder)
    assert saved.finished
    assert [evaluation.round_number for evaluation in saved.evaluations] == [0, 2, 4]
    for evaluation in saved.evaluations:
        rows = result.history[result.history["round"] == evaluation.round_number]
        assert rows["site"].tolist() == [saved.names[site] for site in evaluation.sites]
        assert np.array_equal(rows["global_accuracy"], evaluation.figures["accuracy"][:, 0], equal_nan=True)
        assert np.array_equal(rows["personalized_accuracy"], evaluation.figures["accuracy"][:, -1], equal_nan=True)
