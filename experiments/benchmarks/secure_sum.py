"""What one secure sum costs all of its sites and the server together, without messages.

`python experiments/benchmarks/secure_sum.py [SITES] [NUMBERS]` prints seconds of processor time by step, without and
with 30 % drop-outs after the shares and after the numbers.
"""

from __future__ import annotations

import random
import sys
import time

import numpy as np

from fedmeta.secure import ring, site
from fedmeta.secure.graph import graph_of
from fedmeta.secure.server import unmask
from fedmeta.secure.site import Neighbor

QUANTUM = 2.0**-32


def measure(sites: int, size: int, drops: tuple[float, float]) -> tuple[float, float, float, float]:
    """Returns seconds for keys and shares, for masks, for unmasking, and the largest error in quanta."""
    names = [f"site-{number:05d}" for number in range(sites)]
    data = {name: np.random.default_rng(number).normal(size=size) for number, name in enumerate(names)}
    started = time.process_time()
    graph = graph_of(sites, 0.5)
    secrets = {name: site.begin(name, "a round") for name in names}
    known = {name: Neighbor(name, place, *secrets[name].public) for place, name in enumerate(names)}
    sent = {}
    for place, name in enumerate(names):
        around = [known[names[other]] for other in graph.neighbors(place)]
        secrets[name], sent[name] = site.share_secrets(secrets[name], around, place, graph, 0.5)
    shared = time.process_time()
    left = _without(names, drops[0])
    total = np.zeros(size, dtype=np.uint64)
    for name in left:
        received = {other: sent[other][name] for other in names if name in sent[other]}
        numbers = ring.encode(data[name], QUANTUM, sites)
        secrets[name], masked = site.masked(secrets[name], received, numbers)
        total += masked
    added = time.process_time()
    handed = {}
    for name in _without(left, drops[1]):
        held = secrets[name].shares
        wanted = ([each for each in held if (each in known and each in left) is there] for there in (True, False))
        secrets[name], handed[name] = site.handed_over(secrets[name], len(left), *wanted)
    public = {name: each.mask for name, each in known.items()}
    clear = unmask(
        total, ring=names, graph=graph, context="a round", shared=names, left=left, public=public, shares=handed
    )
    ended = time.process_time()
    error = np.abs(ring.decode(clear, QUANTUM) - sum(data[name] for name in left)).max() / QUANTUM
    return shared - started, added - shared, ended - added, float(error)


def _without(names: list[str], share: float) -> list[str]:
    lost = set(random.Random(0).sample(names, int(share * len(names))))
    return [name for name in names if name not in lost]


if __name__ == "__main__":
    sites, size = (int(word) for word in [*sys.argv[1:], "100", "100000"][:2])
    for drops in ((0.0, 0.0), (0.3, 0.0), (0.0, 0.3)):
        keys, masks, rest, error = measure(sites, size, drops)
        print(
            f"{sites} sites, {size} numbers, drop-outs {drops}: keys and shares {keys:.2f} s, masks {masks:.2f} s, "
            f"unmasking {rest:.2f} s, together {keys + masks + rest:.2f} s; largest error {error:.1f} quanta"
        )
