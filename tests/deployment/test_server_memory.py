"""The memory of the server's own processes, with sites in others: with secure sums it holds no number of one site.

What is looked for is what each site computed, as it wrote it down before masking: meta-gradients, query losses and sums
of features, as numbers of the ring, as float64 and as float32.
"""

from __future__ import annotations

import os
import pickle
import struct
import time
from collections.abc import Iterator

import numpy as np
import pytest

import fedmeta
from fedmeta.runtime import process_guard
from fedmeta.secure import ring
from tests.deployment.test_faults import meanwhile
from tests.deployment.test_rounds import SECURE, Running, started
from tests.deployment.watching import Search, memory_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="another process's memory is read as root"),
]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with started(tmp_path_factory.mktemp("memory"), 3) as running:
        yield running


@pytest.fixture(autouse=True)
def no_marks(three: Running) -> Iterator[None]:
    yield
    for path in three.federation.marks.iterdir():
        path.unlink()


def windows(values: bytes, width: int = 24, distinct: int = 11) -> set[bytes]:
    """Returns some pieces of numbers that stand nowhere by chance."""
    if len(values) < width:
        width, distinct = 8, 5
    pieces = [values[place : place + width] for place in range(0, len(values) - width + 1, 8)]
    telling = [piece for piece in pieces if len(set(piece)) >= distinct]
    return {telling[place] for place in (0, len(telling) // 2, -1)} if telling else set()


def needles(sent: dict[str, bytes], quantum: float) -> set[bytes]:
    """Returns what would be a site's own numbers in a process's memory, in each form that they may have there."""
    found: set[bytes] = set()
    if "clear" in sent:
        numbers = np.frombuffer(sent["clear"], dtype=np.uint64)
        found |= windows(sent["clear"])
        for decoded in (
            ring.decode(numbers, quantum),
            *([ring.decode_wide(numbers, quantum)] if wide(numbers) else []),
        ):
            found |= windows(decoded.tobytes()) | windows(decoded.astype(np.float32).tobytes())
        return found
    for name, value in sent.items():
        if name.startswith("wire/") or name == "bytes":
            continue
        if name.split("/")[0] in ("gradient", "sums", "figures"):
            own = np.frombuffer(value, dtype=np.float32 if name.startswith("gradient") else np.float64)
            found |= windows(value) | windows(own.astype(np.float64).tobytes())
        elif name.endswith("query_loss"):
            losses = pickle.loads(value)
            found |= windows(struct.pack(f"<{len(losses)}d", *losses))
    return found


def wide(numbers: np.ndarray) -> bool:
    return len(numbers) % 2 == 0


def held_numbers(three: Running, experiment: fedmeta.Experiment, hold: str) -> dict[str, int]:
    """Runs an experiment; returns of each kind of message how many sites' numbers the server's memory had meanwhile.

    Args:
        three: The federation.
        experiment: A run.
        hold: The message that site 0 does not answer until the memory was read.
    """
    three.mark("record")
    held = three.mark(f"hold-site-0-{hold}")
    others = [site for site in three.files if site != "site-0"]
    found: dict[str, int] = {}

    def look() -> None:
        three.federation.await_mark(f"site-0-{hold}")
        for site in others:
            three.federation.await_mark(f"sent-{site}-{hold}")
        time.sleep(10.0)  # the replies reach the server's process
        pieces = [piece for pid in process_guard.descendants(three.federation.link.pid) for piece in memory_of(pid)]
        held.unlink()
        wanted: dict[bytes, tuple[str, str]] = {}
        for path in sorted(three.federation.marks.glob("sent-*")):
            _, _, number, *rest = path.name.split("-")
            for needle in needles(pickle.loads(path.read_bytes()), experiment.privacy.quantum):
                wanted[needle] = ("-".join(rest), number)
        assert len({site for _, site in wanted.values()}) == 3
        seen: set[tuple[str, str]] = set()
        total, search = 0, Search(wanted)
        for piece in pieces:
            total += len(piece)
            seen |= {wanted[needle] for needle in search.found(piece)}
        print(f"{len(wanted)} pieces of numbers looked for in {total / 1e6:.0f} MB of the server: {sorted(seen)}")
        assert total > 1e8
        for kind, _ in seen:
            found[kind] = found.get(kind, 0) + 1

    with meanwhile(look):
        fedmeta.run(experiment, runtime="deployment")
    return found


def test_the_servers_memory_holds_no_number_of_one_site(three: Running) -> None:
    secure = three.experiment("memory-secure", SECURE, "evaluation.every=0", rounds=1)
    assert held_numbers(three, secure, "query.unmask-train-1") == {}


def test_without_secure_sums_the_servers_memory_holds_sites_numbers(three: Running) -> None:
    """Else the test above could not fail."""
    found = held_numbers(three, three.experiment("memory-plain", "evaluation.every=0", rounds=1), "train-1")
    assert found.get("train-1", 0) == 2
