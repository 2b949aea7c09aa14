"""Every random draw of a run, keyed by (seed, purpose, round, site name).

A draw depends on its key alone: neither on the node that hosts a site, nor on the order, chunk or runtime it is
made in. Draws for many sites or rows are stateless 64-bit hashes (the finaliser of SplitMix64: Steele, Lea and
Flood, OOPSLA 2014), so that a cohort's draws are a few array operations, not a generator per site.
"""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(keys: Keys) -> Keys:
    z = keys + _GOLDEN
    z ^= z >> np.uint64(30)
    z *= _MIX_1
    z ^= z >> np.uint64(27)
    z *= _MIX_2
    z ^= z >> np.uint64(31)
    return z


def _stream(seed: int, purpose: str, round_number: int) -> np.uint64:
    return np.uint64(_hash(f"{seed}/{purpose}/{round_number}"))


def site_keys(names: Sequence[str]) -> Keys:
    """Returns a stable 64-bit key [sites] for each site name."""
    digests = b"".join([blake2b(name.encode(), digest_size=8).digest() for name in names])
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def draws(seed: int, purpose: str, round_number: int, keys: Keys) -> Keys:
    """Returns one uniform 64-bit draw [sites] for each site key [sites]."""
    return _mix(_mix(keys) ^ _stream(seed, purpose, round_number))


def row_draws(
    seed: int,
    purpose: str,
    round_number: int,
    keys: Keys,
    positions: NDArray[np.int64],
    owners: NDArray[np.int64] | None = None,
) -> Keys:
    """Returns one uniform 64-bit draw [rows] for each (key of its site, position within its site [rows]).

    Args:
        seed: The run's seed.
        purpose: What the draws are for.
        round_number: The round.
        keys: The key of each row's site [rows]; of each site [sites] where `owners` are given.
        positions: The place of each row within its site [rows].
        owners: The site of each row [rows], as a place in `keys`.
    """
    drawn = draws(seed, purpose, round_number, keys)
    return _mix((drawn if owners is None else drawn[owners]) ^ _mix(positions.astype(np.uint64)))


def uniform(bits: Keys) -> NDArray[np.float64]:
    """Returns the draws as numbers in [0, 1), with 53 bits each."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def generator(seed: int, purpose: str, round_number: int = 0, site: str = "") -> np.random.Generator:
    """Returns its own NumPy generator for one (seed, purpose, round, site)."""
    return np.random.default_rng(_hash(f"{seed}/{purpose}/{round_number}/{site}"))


def torch_seed(seed: int, purpose: str, round_number: int = 0, site: str = "") -> int:
    """Returns a 63-bit seed for `torch.manual_seed`, keyed like every other draw."""
    return _hash(f"torch/{seed}/{purpose}/{round_number}/{site}") >> 1
