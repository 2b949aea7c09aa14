"""Secrets of 32 bytes in shares, so many of which give them back and fewer nothing (Shamir 1979)."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

PRIME = 2**256 + 297
"""The field: the smallest prime that every secret of 32 bytes is below."""

BYTES = 33
"""The length of a share."""


def share(secret: bytes, places: Sequence[int], needed: int) -> dict[int, bytes]:
    """Returns a share for each place: the value there of a random polynomial of degree needed - 1 that is it at 0.

    Args:
        secret: 32 bytes.
        places: Who gets a share, as different numbers of at least 0.
        needed: How many shares give the secret back.
    """
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(needed - 1))]
    found = {}
    for place in places:
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * (place + 1) + coefficient) % PRIME
        found[place] = value.to_bytes(BYTES, "big")
    return found


def combine(shares: Mapping[int, bytes], needed: int) -> bytes:
    """Returns the secret of at least so many shares, by Lagrange's polynomial at 0.

    Raises:
        ValueError: There are too few, or they are not of one secret of 32 bytes.
    """
    if len(shares) < needed:
        raise ValueError(f"{len(shares)} shares are left of {needed} that are needed")
    chosen = sorted(shares)[:needed]
    secret = 0
    for place in chosen:
        over, under = 1, 1
        for other in chosen:
            if other != place:
                over = over * (other + 1) % PRIME
                under = under * (other - place) % PRIME
        secret += int.from_bytes(shares[place], "big") * over * pow(under, -1, PRIME)
    secret %= PRIME
    if secret >> 256:
        raise ValueError("the shares are not of one secret")
    return secret.to_bytes(32, "big")
