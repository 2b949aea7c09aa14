import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from fedmeta.runtime import process_guard
from fedmeta.runtime.superlink import keep
from tests.runtime.processes import MARK, marked, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")

# A child, a grandchild in a new session, and an orphan that hides as a daemon does and ignores SIGTERM.
FAMILY = """
import os, signal, subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
subprocess.Popen(sleep, start_new_session=True)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open(sys.argv[1], "w").write("ready")
        time.sleep(600)
    os._exit(0)
time.sleep(600)
"""


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A mark that all processes of a test carry; whatever outlives the test is ended."""
    value = uuid4().hex
    monkeypatch.setenv(MARK, value)
    yield value
    for process in marked(value):
        os.kill(process, signal.SIGKILL)


@pytest.mark.slow
def test_everything_that_came_of_a_command_ends_with_the_block(tmp_path: Path, mark: str) -> None:
    ready = tmp_path / "ready"
    with keep([sys.executable, "-c", FAMILY, str(ready)], os.environ, tmp_path / "log") as process:
        assert wait_until(ready.exists)
        # Keeper, child, grandchild, orphan.
        assert len(marked(mark)) == 4
        assert len(set(process_guard.descendants(process.pid))) == 3
    assert marked(mark) == []
    assert process.returncode == 1


LAUNCHER = """
import os, sys, time
from pathlib import Path
from fedmeta.runtime.superlink import keep
with keep([sys.executable, "-c", sys.argv[1], sys.argv[2]], os.environ, Path(sys.argv[2] + ".log")):
    time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_everything_ends_with_the_launcher_however_that_ends(tmp_path: Path, mark: str, number: int) -> None:
    ready, repository = tmp_path / "ready", Path(__file__).parents[2]
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, FAMILY, str(ready)], cwd=repository, stderr=subprocess.DEVNULL
    )
    assert wait_until(ready.exists)
    os.kill(launcher.pid, number)
    launcher.wait(30)
    assert wait_until(lambda: marked(mark) == [])


@pytest.mark.parametrize(("program", "code"), [("raise SystemExit(3)", 3), ("pass", 0)])
def test_a_command_that_ends_hands_on_its_code(tmp_path: Path, program: str, code: int) -> None:
    with keep([sys.executable, "-c", program], os.environ, tmp_path / "log") as process:
        assert process.wait(30) == code


def test_a_command_that_is_killed_reads_as_a_shell_has_it(tmp_path: Path) -> None:
    program = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with keep([sys.executable, "-c", program], os.environ, tmp_path / "log") as process:
        assert process.wait(30) == 128 + signal.SIGKILL


@pytest.mark.slow
def test_what_a_command_leaves_behind_ends_when_it_ends(tmp_path: Path, mark: str) -> None:
    program = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    with keep([sys.executable, "-c", program], os.environ, tmp_path / "log") as process:
        assert process.wait(30) == 0
        assert marked(mark) == []


def test_what_a_command_prints_is_in_its_log(tmp_path: Path) -> None:
    program = "import sys; print('out'); print('error', file=sys.stderr)"
    with keep([sys.executable, "-c", program], os.environ, tmp_path / "log") as process:
        process.wait(30)
    assert sorted((tmp_path / "log").read_text().split()) == ["error", "out"]


def test_a_process_that_ended_is_not_alive_although_nobody_has_reaped_it() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert process_guard.is_alive(child.pid)
    assert child.stdin is not None
    child.stdin.close()
    assert wait_until(lambda: not process_guard.is_alive(child.pid))
    assert child.wait(30) == 1
    assert process_guard.is_alive(os.getpid())
