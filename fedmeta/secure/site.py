"""What a site does in a round of secure aggregation, and what it refuses.

A site keeps its secrets of one round in a `Secrets` between messages, in the node's memory: who dies loses them, and
is one that dropped out. It hands over shares once a round, never a share of both secrets of one site, and none unless
enough sites are named as left: whatever the server asks, it cannot take the masks off one site with these alone.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from fedmeta.secure.graph import FEWEST, Graph, least
from fedmeta.secure.masks import (
    KEY_BYTES,
    add_mask,
    agreed,
    decrypt,
    encrypt,
    new_key,
    public_of,
    stretched,
)
from fedmeta.secure.ring import Ring
from fedmeta.secure.shamir import BYTES, share


class ProtocolError(ValueError):
    """What the server asks is not the next step of the protocol, or asks for too much."""


@dataclass(frozen=True)
class Neighbor:
    """A site as its neighbors know it.

    Attributes:
        name: Its name.
        place: Its place in the round's ring.
        cipher: The public key by which shares are encrypted for it.
        mask: The public key by which masks are agreed with it.
    """

    name: str
    place: int
    cipher: bytes
    mask: bytes


@dataclass(frozen=True)
class Secrets:
    """What a site keeps of one round.

    Attributes:
        name: The site's name.
        context: The run and the round.
        cipher: Its private key for shares.
        mask: Its private key for masks.
        seed: The seed of the mask that it has alone.
        place: Its place in the ring.
        sites: How many sites the ring has.
        degree: How many neighbors each has.
        needed: How many shares give a secret back.
        survivors: The share of the sites that must be left.
        neighbors: Its neighbors by name.
        keys: By neighbor the key of what is shared with it.
        shares: By name what neighbors shared with it, decrypted: of the seed, then of the mask key.
        step: The last step that it has taken, 1 to 4.
    """

    name: str
    context: str
    cipher: bytes
    mask: bytes
    seed: bytes
    place: int = 0
    sites: int = 0
    degree: int = 0
    needed: int = 0
    survivors: float = 0.0
    neighbors: Mapping[str, Neighbor] = field(default_factory=dict)
    keys: Mapping[str, bytes] = field(default_factory=dict)
    shares: Mapping[str, bytes] = field(default_factory=dict)
    step: int = 1

    @property
    def public(self) -> tuple[bytes, bytes]:
        """Its public keys, for shares and for masks."""
        return public_of(self.cipher), public_of(self.mask)

    def to_text(self) -> str:
        """Returns it as a text, for the node's memory."""
        return json.dumps(asdict(self), default=lambda value: base64.b64encode(value).decode("ascii"))

    @classmethod
    def from_text(cls, text: str) -> Secrets:
        """Returns what `to_text` wrote."""
        entries = json.loads(text)
        for key in ("cipher", "mask", "seed"):
            entries[key] = base64.b64decode(entries[key])
        for key in ("shares", "keys"):
            entries[key] = {name: base64.b64decode(value) for name, value in entries[key].items()}
        entries["neighbors"] = {
            name: Neighbor(**{**own, "cipher": base64.b64decode(own["cipher"]), "mask": base64.b64decode(own["mask"])})
            for name, own in entries["neighbors"].items()
        }
        return cls(**entries)


def begin(name: str, context: str) -> Secrets:
    """Step 1: makes a site's keys and seed of a round."""
    return Secrets(name, context, new_key()[0], new_key()[0], os.urandom(KEY_BYTES))


def share_secrets(
    own: Secrets, neighbors: Sequence[Neighbor], place: int, graph: Graph, survivors: float
) -> tuple[Secrets, dict[str, bytes]]:
    """Step 2: shares a site's seed and mask key among its neighbors and itself.

    Returns:
        What the site keeps, and by neighbor what is sent to it, encrypted for it alone.

    Raises:
        ProtocolError: The step is not the next one, or the round has too few sites, neighbors or needed shares.
    """
    _check_step(own, 1)
    by_place = {each.place: each for each in neighbors}
    if graph.sites < FEWEST:
        raise ProtocolError(f"a round of {graph.sites} sites hides nothing: {FEWEST} is the fewest")
    if sorted(by_place) != graph.neighbors(place) or len({each.name for each in neighbors}) < len(neighbors):
        raise ProtocolError("its neighbors are not those of its place")
    if own.name in {each.name for each in neighbors} or len({each.mask for each in neighbors}) < len(neighbors):
        raise ProtocolError("a neighbor is the site itself, or is there twice")
    if not 2 <= graph.needed <= len(neighbors) + 1:
        raise ProtocolError(f"{graph.needed} shares of {len(neighbors) + 1} are not to be enough")
    places = [*by_place, place]
    seeds, keys = share(own.seed, places, graph.needed), share(own.mask, places, graph.needed)
    agreed_keys = {each.name: agreed(own.cipher, each.cipher, "share", own.context) for each in neighbors}
    sent = {
        each.name: encrypt(
            agreed_keys[each.name],
            seeds[each.place] + keys[each.place],
            f"{own.name} to {each.name}",
        )
        for each in neighbors
    }
    kept = replace(
        own,
        place=place,
        sites=graph.sites,
        degree=graph.degree,
        needed=graph.needed,
        survivors=survivors,
        neighbors={each.name: each for each in neighbors},
        keys=agreed_keys,
        shares={own.name: seeds[place] + keys[place]},
        step=2,
    )
    return kept, sent


def masked(own: Secrets, received: Mapping[str, bytes], numbers: Ring) -> tuple[Secrets, Ring]:
    """Step 3: hides a site's numbers.

    Args:
        own: What the site keeps.
        received: By neighbor what it sent in step 2, for every one that did.
        numbers: The site's numbers in the ring.

    Raises:
        ProtocolError: The step is not the next one, a share is none, or too few neighbors are left to hide behind.
    """
    _check_step(own, 2)
    if not set(received) <= set(own.neighbors):
        raise ProtocolError("a share is not of a neighbor")
    if len(received) + 1 < own.needed:
        raise ProtocolError(f"{len(received)} neighbors are left, and {own.needed - 1} are the fewest")
    shares = dict(own.shares)
    for name, text in received.items():
        shares[name] = decrypt(own.keys[name], text, f"{name} to {own.name}")
        if len(shares[name]) != 2 * BYTES:
            raise ProtocolError("a share has another length than it should")
    total, graph = numbers.copy(), Graph(own.sites, own.degree, own.needed)
    add_mask(total, stretched(own.seed, own.context), 1)
    for name in received:
        if not graph.near(own.place, own.neighbors[name].place):
            continue
        key = agreed(own.mask, own.neighbors[name].mask, "mask", own.context)
        add_mask(total, key, 1 if own.name < name else -1)
    return replace(own, shares=shares, step=3), total


def handed_over(own: Secrets, left: int, seeds: Sequence[str], keys: Sequence[str]) -> tuple[Secrets, dict[str, bytes]]:
    """Step 4: returns its shares of the seed of neighbors that are left, and of the mask key of those that are not.

    Args:
        own: What the site keeps.
        left: How many sites of the round sent their numbers.
        seeds: Whose seeds are asked for: those of the site and its neighbors that did.
        keys: Whose mask keys are asked for: those of neighbors that shared, and then dropped out.

    Raises:
        ProtocolError: The step is not the next one, both secrets of a site are asked for, or too few sites are left.
    """
    _check_step(own, 3)
    if set(seeds) & set(keys) or own.name in keys:
        raise ProtocolError("both secrets of one site are asked for")
    if not {*seeds, *keys} <= set(own.shares):
        raise ProtocolError("a secret is asked for of which the site has no share")
    if left < least(own.sites, own.survivors) or left < len(seeds):
        raise ProtocolError(f"{left} sites are left of {own.sites}, too few to add up")
    shares = {name: own.shares[name][:BYTES] for name in seeds}
    shares |= {name: own.shares[name][BYTES:] for name in keys}
    # What is left of the round's secrets is not needed any more.
    return replace(own, cipher=b"", mask=b"", seed=b"", keys={}, shares={}, step=4), shares


def _check_step(own: Secrets, done: int) -> None:
    if own.step != done:
        raise ProtocolError(f"step {done + 1} of a round was asked for after step {own.step}")
