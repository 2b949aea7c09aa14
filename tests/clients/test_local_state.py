"""What a site keeps on its disk, and for how long."""

from pathlib import Path

import numpy as np
import pytest
import torch

import fedmeta
from clients import local_state

SITE = "Mercy Hospital"


def kept(folder: Path) -> list[int]:
    (own,) = folder.iterdir()
    return sorted(int(path.stem.removeprefix("round-")) for path in own.iterdir())


def train(folder: Path, rounds: range, saved: tuple[int, ...], course: float = 0.0) -> None:
    """Keeps in each round ten times what was kept before it, plus one, and a sign of the course."""
    for number in rounds:
        before = local_state.read(folder, SITE, number)
        value = torch.zeros(1, dtype=torch.float64) if before is None else before["w"]
        local_state.write(folder, SITE, number, {"w": 10 * value + 1 + course}, saved)


def test_two_files_stay_and_one_for_each_checkpoint(tmp_path: Path) -> None:
    train(tmp_path, range(1, 5), ())
    assert kept(tmp_path) == [3, 4]
    train(tmp_path, range(5, 10), (4, 3))
    assert kept(tmp_path) == [3, 4, 8, 9]
    train(tmp_path, range(10, 12), (9, 4))
    assert kept(tmp_path) == [4, 9, 10, 11]


def test_a_resume_from_either_checkpoint_takes_the_same_course(tmp_path: Path) -> None:
    unbroken = tmp_path / "unbroken"
    train(unbroken, range(1, 13), ())
    expected = local_state.read(unbroken, SITE, 13)
    assert expected is not None
    for back_to in (8, 4):
        folder = tmp_path / str(back_to)
        train(folder, range(1, 5), ())
        train(folder, range(5, 9), (4,))
        train(folder, range(9, 12), (8, 4))
        # The server went back; what the site did meanwhile must not come back.
        again = (8, 4) if back_to == 8 else (4,)
        train(folder, range(back_to + 1, 13), again)
        found = local_state.read(folder, SITE, 13)
        assert found is not None
        assert torch.equal(found["w"], expected["w"])


def test_what_was_kept_on_a_course_that_was_left_goes(tmp_path: Path) -> None:
    train(tmp_path, range(1, 9), (4,), course=0.5)
    train(tmp_path, range(5, 6), (4,))
    assert kept(tmp_path) == [4, 5]


def test_a_copy_of_a_file_is_left_alone(tmp_path: Path) -> None:
    train(tmp_path, range(1, 3), ())
    (own,) = tmp_path.iterdir()
    copy = own / "round-000009 (copy).safetensors"
    copy.touch()
    train(tmp_path, range(3, 5), ())
    assert copy.exists()
    copy.unlink()
    assert kept(tmp_path) == [3, 4]


def test_a_damaged_file_counts_as_none(tmp_path: Path) -> None:
    train(tmp_path, range(1, 3), ())
    (own,) = tmp_path.iterdir()
    (own / "round-000002.safetensors").write_bytes(b"not a tensor")
    assert local_state.read(tmp_path, SITE, 3) is None


@pytest.mark.slow
def test_a_run_keeps_personal_parts_in_its_own_folder_wherever_it_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    random = np.random.default_rng(0)
    np.savez(tmp_path / "sites.npz", x=random.normal(size=(60, 4)), y=np.arange(60) % 3, site=np.arange(60) % 5)
    settings = [
        "data.source=npz", f"data.path={tmp_path / 'sites.npz'}", "learner.name=ditto", "server.rounds=2",
        "tracking.uri=none", f"tracking.folder={tmp_path / 'runs'}", "evaluation.local_baseline=none",
    ]  # fmt: skip
    result = fedmeta.run(fedmeta.Experiment().with_overrides(settings))
    assert [path.parent for path in (tmp_path / "runs").glob("*/personal")] == [result.folder]
    assert list(elsewhere.iterdir()) == []
