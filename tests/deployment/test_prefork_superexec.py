"""A process that has torch is copied for every message of a site; the copies import what was submitted."""

import json
import os
import signal
import socket
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

# The process that waits, with a task that writes down what a copy finds; its own line is written last.
WAITING = """
import json, os, socket, sys
from fedmeta import prefork_superexec

def look(task):
    found = {"pid": os.getpid(), "task": task, "torch": "torch" in sys.modules}
    found["threads"] = len(os.listdir("/proc/self/task"))
    found["installed"] = [name for name in sys.modules if name.split(".")[0] == "fedmeta"]
    os.write(1, (json.dumps(found) + "\\n").encode())

prefork_superexec.run_task = look
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
waiting = os.fork()
if waiting == 0:
    ours.close()
    prefork_superexec.serve(theirs)
    os._exit(0)
theirs.close()
answers = [prefork_superexec.asked(ours, {"number": number}) for number in range(3)]
os.write(1, (json.dumps({"answers": answers, "waiting": waiting}) + "\\n").encode())
sys.stdin.read()
"""


def test_each_task_gets_a_copy_that_has_torch_and_nothing_of_ours() -> None:
    with subprocess.Popen([sys.executable, "-c", WAITING], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        *copies, launcher = sorted(
            (json.loads(next(process.stdout)) for _ in range(4)), key=lambda found: "answers" in found
        )
        assert launcher["answers"] == [True] * 3
        assert sorted(copy["task"]["number"] for copy in copies) == [0, 1, 2]
        assert len({copy["pid"] for copy in copies} | {launcher["waiting"]}) == 4
        assert all(copy["torch"] and copy["threads"] == 1 and copy["installed"] == [] for copy in copies)
        assert process_guard.is_alive(launcher["waiting"])
        process.kill()
    await_true(lambda: not process_guard.is_alive(launcher["waiting"]), "the end of the process that waited")


def test_a_process_that_is_gone_is_not_asked_again() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    assert not prefork_superexec.asked(ours, {"number": 0})
    assert not prefork_superexec.asked(ours, {"number": 1})


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

    cold = "MetaModel `flwr-clientapp` process"
    deployed_is_local("warm")
    assert not [site for site in files if cold in (tmp_path / f"{site}-app.log").read_text()]
    lost = next(iter(apps))
    executor, waiting = sorted(process_guard.descendants(apps[lost].pid))
    os.kill(waiting, signal.SIGKILL)
    deployed_is_local("cold")
    assert [site for site in files if cold in (tmp_path / f"{site}-app.log").read_text()] == [lost]
    assert process_guard.is_alive(executor)
