"""A process that has torch is copied for every message of a site; the copies import what was submitted."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fedmeta
from fedmeta import prefork_superexec
from fedmeta.runtime import process_guard
from tests.deployment.processes import write_sites
from tests.deployment.test_faults import Federation, await_true, experiment_of, federation, store_of

__all__ = ["federation"]

# The process that waits, whose copies write down what they find; its own line is written last.
WAITING = """
import json, os, sys
from pathlib import Path
from fedmeta import prefork_superexec

def look(arguments):
    found = {"pid": os.getpid(), "arguments": arguments, "torch": "torch" in sys.modules}
    found["threads"] = len(os.listdir("/proc/self/task"))
    found["installed"] = [name for name in sys.modules if name.split(".")[0] == "fedmeta"]
    os.write(1, (json.dumps(found) + "\\n").encode())

folder = Path(sys.argv[1])
listener = prefork_superexec.listen(folder / "copies")
watched, ours = os.pipe()
waiting = os.fork()
if waiting == 0:
    os.close(ours)
    prefork_superexec.serve(listener, watched, look)
    os._exit(0)
os.write(1, (json.dumps({"waiting": waiting}) + "\\n").encode())
sys.stdin.read()
"""


def ask(address: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs what a SuperExec finds as flwr-clientapp; without an answer it becomes /bin/echo."""
    env = {**os.environ, **prefork_superexec.client_environment(address, "/bin/echo")}
    command = ["flwr-clientapp", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=120)


@pytest.mark.slow
def test_each_message_gets_a_copy_that_has_torch_and_nothing_of_ours(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WAITING, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        waiting = json.loads(next(process.stdout))["waiting"]
        answers = [ask(tmp_path / "copies", "--number", str(number)) for number in range(3)]
        assert [(answer.stdout, answer.stderr) for answer in answers] == [("", "")] * 3
        copies = [json.loads(next(process.stdout)) for _ in range(3)]
        assert sorted(copy["arguments"] for copy in copies) == [["--number", str(number)] for number in range(3)]
        assert len({copy["pid"] for copy in copies} | {waiting}) == 4
        assert all(copy["torch"] and copy["threads"] == 1 and copy["installed"] == [] for copy in copies)
        assert process_guard.is_alive(waiting)
        process.kill()
    await_true(lambda: not process_guard.is_alive(waiting), "the end of the process that waited")


def test_without_an_answer_flowers_command_runs(tmp_path: Path) -> None:
    asked = ask(tmp_path / "none", "--token", "x")
    assert asked.stdout == "--token x\n"
    assert "no copy of a process could be had" in asked.stderr


@pytest.mark.parametrize(
    ("how", "code", "shown"),
    [("pass", 0, ""), ("sys.exit(3)", 3, ""), ("sys.exit('no node')", 1, "no node"), ("1 / 0", 1, "ZeroDivisionError")],
)
def test_a_copy_ends_with_the_commands_code_and_at_once(how: str, code: int, shown: str) -> None:
    script = f"""
import atexit, sys
from fedmeta import prefork_superexec

def command():
    print("replied")
    {how}

atexit.register(print, "what torch does at an interpreter's end")
prefork_superexec._flowers_command = lambda: command
prefork_superexec.run_clientapp(["--token", "x"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (code, "replied\n")
    assert shown in done.stderr


@pytest.mark.slow
def test_it_takes_the_words_of_flowers_command() -> None:
    command = [sys.executable, "-P", "-m", "fedmeta.prefork_superexec"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True, timeout=120)
    assert "--runtime-api-address" in shown.stdout
    wrong = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert wrong.returncode == 2
    assert "--runtime-api-address" in wrong.stderr


@pytest.mark.slow
def test_a_run_over_copies_and_one_after_their_origin_is_lost(tmp_path: Path, federation: Federation) -> None:
    files = write_sites(tmp_path / "data", sites=2)
    apps = {site: federation.start_node_and_app(site, file) for site, file in files.items()}
    local = fedmeta.run(experiment_of(tmp_path, [*files], store=store_of(tmp_path), folder=tmp_path / "local"))

    def deployed_is_local(folder: str) -> None:
        experiment = experiment_of(tmp_path, [*files], store=store_of(tmp_path), folder=tmp_path / folder)
        deployed = fedmeta.run(experiment, runtime="deployment")
        for name, value in local.meta_state.items():
            torch.testing.assert_close(deployed.meta_state[name], value, rtol=0, atol=1e-5)

    cold = "no copy of a process could be had"
    deployed_is_local("warm")
    assert not [site for site in files if cold in (tmp_path / f"{site}-app.log").read_text()]
    lost = next(iter(apps))
    executor, waiting = sorted(process_guard.descendants(apps[lost].pid))[:2]
    os.kill(waiting, signal.SIGKILL)
    deployed_is_local("cold")
    assert [site for site in files if cold in (tmp_path / f"{site}-app.log").read_text()] == [lost]
    assert process_guard.is_alive(executor)
