"""Flower's SuperExec, with torch imported once: `python -P -m fedmeta.prefork_superexec`, options as flower-superexec.

Flower starts a process for every message that a site gets, and each imports torch: seconds, for a round that computes
for milliseconds. Here a process imports the libraries once, before anything else runs in it, and waits. A message gets
a copy of it, by fork, which does what Flower's `flwr-clientapp` does: the submitted code is imported anew by each copy,
and never by the process that waits. Where that is lost, each message gets a process of Flower's own again.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from typing import Any

LIBRARIES = (
    "flwr.supernode.runtime.run_clientapp",
    "torch",
    "torch._dynamo",  # which torch imports with the first vmap, for longer than itself
    "httpcore",
    "pandas",
    "pydantic",
    "safetensors.torch",
)
"""What a site's app imports that is not the submitted code."""
ANSWERS_S = 120.0
"""How long a fork may take (seconds); the first one waits for the imports."""
LONGEST = 1 << 16
"""How long a task may be as JSON (bytes)."""


def main() -> None:
    """Starts the process that waits, and becomes the SuperExec."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # Before anything is imported that might start a thread: a fork has the one that forks and no other.
    if os.fork() == 0:
        ours.close()
        serve(theirs)
        return
    theirs.close()
    ours.settimeout(ANSWERS_S)
    run_superexec_with_prefork(ours)


def serve(requests: socket.socket) -> None:
    """Imports the libraries, and then forks for every request; returns in each copy, when its work is done.

    Args:
        requests: Takes a message's task as JSON, and gives one byte back once there is a copy for it. Its other end is
            the SuperExec's: when that ends, so does this process.
    """
    # The copies import the packages that were submitted, not those that are installed here.
    for name in [name for name in sys.modules if name.partition(".")[0] == __package__]:
        del sys.modules[name]
    for name in LIBRARIES:
        with suppress(ImportError):  # the message that needs it says so
            import_module(name)
    # Ended copies are nobody's to wait for; Ctrl-C is the SuperExec's to see.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while request := requests.recv(LONGEST):
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            return run_task(json.loads(request))
        requests.send(b"1")
    return None


def run_task(task: dict[str, Any]) -> None:
    """Does what `flwr-clientapp` does: gets the message from the node, lets the submitted app answer, gives it back."""
    import numpy as np
    from flwr.supercore.tls import validate_and_resolve_root_certificates
    from flwr.supernode.runtime.run_clientapp import run_clientapp

    np.random.seed()  # noqa: NPY002  (whoever draws from NumPy's common generator: copies must not draw alike)
    run_clientapp(
        runtime_api_address=task["runtime_api_address"],
        token=task["token"],
        insecure=task["insecure"],
        certificates=validate_and_resolve_root_certificates(task["root_certificates_path"], task["insecure"]),
        parent_pid=task["parent_pid"],
        runtime_dependency_install=task["runtime_dependency_install"],
    )


def run_superexec_with_prefork(waiting: socket.socket) -> None:
    """Runs `flower-superexec`, whose executor asks the process that waits."""
    from flwr.supercore.cli import flower_superexec
    from flwr.supercore.constant import TaskType
    from flwr.supercore.superexec import run_superexec
    from flwr.supercore.superexec.executor import ExecutionSpec, Executor, LaunchResult, SubprocessExecutor

    class PreforkExecutor(SubprocessExecutor):
        """Flower's own, except for a site's messages."""

        def launch(self, spec: ExecutionSpec) -> LaunchResult:
            """Has a copy made for a site's message; starts a process for everything else."""
            if spec.task_type is TaskType.CLIENT_APP and not spec.suppress_output and asked(waiting, asdict(spec)):
                return LaunchResult.accepted()
            return super().launch(spec)

    # Flower has no option for an executor of one's own.
    names = vars(run_superexec)
    flowers: Callable[..., Executor] = names["get_executor"]

    def chosen(*args: Any, **options: Any) -> Executor:
        executor = flowers(*args, **options)
        return PreforkExecutor() if type(executor) is SubprocessExecutor else executor

    names["get_executor"] = chosen
    flower_superexec()


def asked(waiting: socket.socket, task: dict[str, Any]) -> bool:
    """Returns whether the process that waits made a copy for a task. One that did not is not asked again."""
    try:
        waiting.send(json.dumps(task).encode())
        if waiting.recv(1) == b"1":
            return True
    except OSError:
        pass
    waiting.close()
    return False


if __name__ == "__main__":
    main()
