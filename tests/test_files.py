import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fedmeta import files
from fedmeta.errors import FedmetaError


def test_a_file_is_written_whole_and_folders_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync_folder", synced.append)
    files.write_atomic(tmp_path / "a" / "b" / "file", b"one")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"one"
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    files.write_atomic(tmp_path / "a" / "b" / "file", b"two")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no space"), KeyboardInterrupt()])
def test_what_cannot_be_written_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    path = tmp_path / "file"
    files.write_atomic(path, b"one")

    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(*((os, "fsync", fail) if step == "fsync" else (Path, "replace", fail)))
    with pytest.raises(type(error)):
        files.write_atomic(path, b"two")
    monkeypatch.undo()
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".file.0123.part", "file.part", ".hidden"):
        (tmp_path / name).touch()
    files.remove_parts(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "file.part"]


@pytest.mark.slow
def test_a_lock_keeps_others_out_until_its_holder_ends_or_dies(tmp_path: Path) -> None:
    path = tmp_path / "new" / ".lock"
    held = textwrap.dedent(f"""
        import time
        from pathlib import Path
        from fedmeta.files import locked
        with locked(Path({str(path)!r})):
            print("held", flush=True)
            time.sleep(600)
    """)
    with subprocess.Popen([sys.executable, "-c", held], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(FedmetaError, match="another process writes there"), files.locked(path):
            pass
        process.kill()
    with files.locked(path), pytest.raises(FedmetaError, match="another process writes there"), files.locked(path):
        pass
    with files.locked(path, wait=True):
        pass


def test_a_lock_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FedmetaError, match="cannot be created"), files.locked(tmp_path / "file" / ".lock"):
        pass
