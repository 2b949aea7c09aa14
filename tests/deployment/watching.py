"""What is in a process's memory, and what goes up a line: to look for what should not be there, and for what should."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

HERE = "127.0.0.1"
_PIECE = 1 << 26


def memory_of(pid: int) -> Iterator[bytes]:
    """Yields the memory of a process, mapping by mapping: all but what is mapped of files that it cannot write to."""
    with Path(f"/proc/{pid}/maps").open() as maps, Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in maps.read().splitlines():
            where, rights, _, _, inode = line.split(maxsplit=5)[:5]
            if "r" not in rights or ("w" not in rights and inode != "0") or line.endswith(("[vvar]", "[vsyscall]")):
                continue
            start, end = (int(edge, 16) for edge in where.split("-"))
            found = bytearray()
            with suppress(OSError):  # a mapping may be gone by now
                memory.seek(start)
                while len(found) < end - start and (piece := memory.read(min(_PIECE, end - start - len(found)))):
                    found += piece
            yield bytes(found)


@contextmanager
def recorded_line(to: int) -> Iterator[tuple[int, bytearray]]:
    """Gives a port of this machine that leads to another, and all bytes that went up there so far."""
    went_up = bytearray()
    listener = socket.create_server((HERE, 0))

    def pump(source: socket.socket, sink: socket.socket, record: bool) -> None:
        with suppress(OSError):
            while piece := source.recv(1 << 16):
                if record:
                    went_up.extend(piece)
                sink.sendall(piece)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with suppress(OSError):
            while True:
                below, _ = listener.accept()
                above = socket.create_connection((HERE, to))
                for ends in ((below, above, True), (above, below, False)):
                    threading.Thread(target=pump, args=ends, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield int(listener.getsockname()[1]), went_up
    finally:
        listener.close()
