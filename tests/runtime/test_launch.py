import json
import os
from pathlib import Path

import pytest

from fedmeta.launch import (
    RESULT_VARIABLE,
    ProgressTail,
    announce,
    ask_to_stop,
    launcher_folder,
    read_result,
    reporter,
    server_process,
    write_result,
)
from fedmeta.progress import Progress

STEPS = [
    Progress(number, 9, 0.1 * number, None, number, 'a "note"\nof two lines' * (number == 2)) for number in range(4)
]


def test_progress_arrives_once_and_in_order(tmp_path: Path) -> None:
    report, tail = reporter(tmp_path), ProgressTail(tmp_path)
    assert list(tail.fresh()) == []
    report(STEPS[0])
    report(STEPS[1])
    assert list(tail.fresh()) == STEPS[:2]
    assert list(tail.fresh()) == []
    report(STEPS[2])
    report(STEPS[3])
    assert list(tail.fresh()) == STEPS[2:]
    assert list(ProgressTail(tmp_path).fresh()) == STEPS


def test_a_line_that_is_still_being_written_is_read_later(tmp_path: Path) -> None:
    tail, line = ProgressTail(tmp_path), STEPS[2].to_json().encode() + b"\n"
    with (tmp_path / "progress.jsonl").open("wb", buffering=0) as file:
        for byte in line[:-1]:
            file.write(bytes([byte]))
            assert list(tail.fresh()) == []
        file.write(b"\n")
    assert list(tail.fresh()) == [STEPS[2]]


def test_a_result_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    assert read_result(tmp_path) is None
    (tmp_path / "result.json.part").write_text('{"summ')
    assert read_result(tmp_path) is None
    write_result(tmp_path, {"summary": {"rounds": 3}, "folder": "/runs/zürich"})
    assert read_result(tmp_path) == {"summary": {"rounds": 3}, "folder": "/runs/zürich"}
    assert json.loads((tmp_path / "result.json").read_text())["folder"] == "/runs/zürich"


def test_a_run_that_is_asked_to_stop_does_so_at_its_next_report(tmp_path: Path) -> None:
    report = reporter(tmp_path)
    report(STEPS[0])
    ask_to_stop(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        report(STEPS[1])
    assert list(ProgressTail(tmp_path).fresh()) == STEPS[:2]


def test_the_launcher_is_known_by_a_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(RESULT_VARIABLE, raising=False)
    assert launcher_folder() is None
    monkeypatch.setenv(RESULT_VARIABLE, str(tmp_path))
    assert launcher_folder() == tmp_path


def test_the_server_reports_which_process_it_is(tmp_path: Path) -> None:
    assert server_process(tmp_path) is None
    announce(tmp_path)
    assert server_process(tmp_path) == os.getpid()
