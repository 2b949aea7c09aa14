"""What is in a process's memory, and what goes up a line: to look for what should not be there, and for what should."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

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


class Search:
    """Looks for many pieces of bytes at once: by two bytes of each, then by two more, and then by all of it."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._first = np.zeros(1 << 16, dtype=bool)
        self._pieces: dict[bytes, list[tuple[int, bytes]]] = {}
        for piece in pieces:
            place = max(range(len(piece) - 3), key=lambda start: len({*piece[start : start + 4]} - {0}))
            self._first[int.from_bytes(piece[place : place + 2], "little")] = True
            self._pieces.setdefault(piece[place : place + 4], []).append((place, piece))
        self._keys = np.array(sorted(int.from_bytes(key, "little") for key in self._pieces), dtype=np.uint32)

    def found(self, memory: bytes) -> set[bytes]:
        """Returns the pieces that are in some memory."""
        seen: set[bytes] = set()
        every = np.frombuffer(memory, dtype=np.uint8)
        for shift in range(2 if len(memory) > 4 else 0):
            starts = np.frombuffer(memory, dtype="<u2", count=(len(memory) - shift) // 2, offset=shift)
            at = 2 * np.flatnonzero(self._first[starts]) + shift
            at = at[at <= len(memory) - 4]
            keys = sum(every[at + place].astype(np.uint32) << np.uint32(8 * place) for place in range(4))
            for where in at[np.isin(keys, self._keys)].tolist():
                for place, piece in self._pieces[memory[where : where + 4]]:
                    start = where - place
                    if start >= 0 and memory[start : start + len(piece)] == piece:
                        seen.add(piece)
        return seen


Ends = tuple[socket.socket, socket.socket]
"""Both ends of a connection."""


@contextmanager
def relayed(to: int, up: Callable[[bytes, Ends], None]) -> Iterator[int]:
    """Gives a port of this machine that leads to another.

    Args:
        to: The other port.
        up: Called with each piece of bytes before it goes up, and both ends of the connection that it came by.
    """
    listener = socket.create_server((HERE, 0))

    def pump(source: socket.socket, sink: socket.socket, upward: bool) -> None:
        with suppress(OSError):
            while piece := source.recv(1 << 16):
                if upward:
                    up(piece, (source, sink))
                sink.sendall(piece)
        shut((source, sink))

    def accept() -> None:
        with suppress(OSError):
            while True:
                below, _ = listener.accept()
                above = socket.create_connection((HERE, to))
                for pair in ((below, above, True), (above, below, False)):
                    threading.Thread(target=pump, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        listener.close()


def shut(ends: Iterable[socket.socket]) -> None:
    """Breaks connections off."""
    for end in ends:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@contextmanager
def recorded_line(to: int) -> Iterator[tuple[int, bytearray]]:
    """Gives a port of this machine that leads to another, and all bytes that went up there so far."""
    went_up = bytearray()
    with relayed(to, lambda piece, _: went_up.extend(piece)) as port:
        yield port, went_up
