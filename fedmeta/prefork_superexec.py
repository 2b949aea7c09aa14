"""Flower's SuperExec, with torch imported once: `python -P -m fedmeta.prefork_superexec`, options as flower-superexec.

`flower-superexec` starts the command `flwr-clientapp` for every message that a site gets, and each such process imports
torch: seconds, for a round that computes for milliseconds. Here one process imports the libraries first and waits at a
socket; the SuperExec is started with a folder in front of its PATH whose `flwr-clientapp` asks that process for a copy
of it, by fork, which then runs Flower's own command. The submitted code is imported by each copy, and never by the
process that waits. Where that process is lost, Flower's command is started as usual.

Only Flower's commands are used: their names, their options, and the entry points that its package declares.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

SUPEREXEC, CLIENTAPP = "flower-superexec", "flwr-clientapp"
LIBRARIES = (
    *(
        "torch",
        "torch.func",
        "numpy",
        "pandas",
        "safetensors.torch",
        "flwr.app",
        "flwr.clientapp",
        "tomllib",
        "tomli_w",
    ),
    *("pydantic.main", "pydantic.json_schema", "pydantic.type_adapter"),  # pydantic leaves these to their first use
    "torch._dynamo",  # which torch leaves to the first gradient of a transform, and which takes as long as torch itself
)
"""What a site's app imports that is not the submitted code."""
ANSWERS_S = 120.0
"""How long a copy may take (seconds); the first one waits for the imports."""
LONGEST = 1 << 16
"""How long a command may be as JSON (bytes)."""

CLIENT = Path(__file__).with_name("prefork_client")
"""The folder with the program that asks for a copy, or becomes Flower's command where it gets none."""


def main() -> None:
    """Starts the process that waits, and becomes the SuperExec."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    superexec, clientapp = (shutil.which(command, path=path) for command in (SUPEREXEC, CLIENTAPP))
    if superexec is None or clientapp is None:
        sys.exit(f"fedmeta: {SUPEREXEC} or {CLIENTAPP} is not installed: pip install flwr")
    if not os.access(CLIENT / CLIENTAPP, os.X_OK):
        sys.exit(f"fedmeta: {CLIENT / CLIENTAPP} is not executable: chmod +x it, or use {SUPEREXEC} itself")
    folder = Path(tempfile.mkdtemp(prefix="fedmeta-"))
    listener = listen(folder / "copies")
    # The SuperExec's end of this pipe closes with it.
    watched, ours = os.pipe()
    # Before anything is imported that might start a thread: a fork has the thread that forks and no other.
    if os.fork() == 0:
        os.close(ours)
        serve(listener, watched, run_clientapp, folder)
        return
    os.close(watched)
    listener.close()
    os.set_inheritable(ours, True)
    os.execve(superexec, [SUPEREXEC, *sys.argv[1:]], {**os.environ, **client_environment(folder / "copies", clientapp)})


def listen(address: Path) -> socket.socket:
    """Returns a socket at an address that this user alone reaches."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(address))
    listener.listen(64)
    return listener


def client_environment(address: Path, command: str) -> dict[str, str]:
    """Returns the variables under which `flwr-clientapp` asks at an address, and becomes a command without answer."""
    return {
        "PATH": os.pathsep.join([str(CLIENT), os.environ.get("PATH", os.defpath)]),
        "FEDMETA_PREFORK_SOCKET": str(address),
        "FEDMETA_PREFORK_SECONDS": str(ANSWERS_S),
        "FEDMETA_PREFORK_COMMAND": command,
    }


def serve(
    listener: socket.socket, watched: int, run: Callable[[Sequence[str]], None], folder: Path | None = None
) -> None:
    """Imports the libraries, and then forks for every request; returns in each copy, when its work is done.

    Args:
        listener: Takes a command's arguments as JSON; one byte is sent back once there is a copy for them.
        watched: A pipe whose other end is the SuperExec's: when that ends, so does this process.
        run: What a copy does with the arguments.
        folder: Removed at the end.
    """
    # The copies import the packages that were submitted, not those that are installed here.
    for name in [name for name in sys.modules if name.partition(".")[0] == __package__]:
        del sys.modules[name]
    for name in LIBRARIES:
        with suppress(ImportError):  # the message that needs it reports it
            import_module(name)
    _first_transform()
    _flowers_command()
    # Nothing waits for ended copies; Ctrl-C is for the SuperExec.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([listener.fileno(), watched], [], [])
        if watched in ready:
            break
        asked, _ = listener.accept()
        with asked:
            asked.settimeout(1.0)
            try:
                arguments = json.loads(asked.recv(LONGEST))
            except (OSError, ValueError):
                continue
            if os.fork() == 0:
                listener.close()
                os.close(watched)
                asked.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                return run(arguments)
            with suppress(OSError):
                asked.send(b"1")
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    return None


def _first_transform() -> None:
    """Has torch import and build what it leaves to the first `vmap` and the first `jvp`."""
    with suppress(ImportError):
        import torch

        zero = torch.zeros(1)
        torch.func.vmap(torch.neg)(zero)
        torch.func.jvp(torch.neg, (zero,), (zero,))


def run_clientapp(arguments: Sequence[str]) -> None:
    """Runs Flower's command: it gets a message from the node, has the submitted app reply, and gives the reply back.

    Does not return. What torch does when an interpreter ends takes over a second of processor time, for each message,
    and the copy leaves nothing that it is needed for.
    """
    import numpy as np

    np.random.seed()  # noqa: NPY002  (copies must not draw alike from NumPy's common generator)
    sys.argv = [CLIENTAPP, *arguments]
    code: object = 0
    try:
        _flowers_command()()
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        if isinstance(code, str):
            print(code, file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def _flowers_command() -> Callable[[], None]:
    """Returns what Flower declares as its command."""
    (command,) = entry_points(group="console_scripts", name=CLIENTAPP)
    loaded: Callable[[], None] = command.load()
    return loaded


if __name__ == "__main__":
    main()
