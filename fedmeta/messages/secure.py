"""The steps of secure aggregation as messages (`fedmeta.secure`): public keys, shares, masked numbers, shares back.

None of them holds a number of one site that means anything alone: public keys, texts encrypted for another site,
numbers under a mask, and shares of secrets of which only so many give one back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedmeta.messages.records import (
    MessageError,
    only,
    read_arrays,
    read_list,
    read_names,
    read_record,
    read_scalar,
    write_arrays,
    write_names,
)
from fedmeta.secure.masks import KEY_BYTES
from fedmeta.secure.shamir import BYTES
from fedmeta.text import first_bad_name

LONGEST_CONTEXT = 300
"""The longest name of a round (characters)."""

MOST_SITES = 1 << 20
"""The most sites that a round may have."""

LONGEST_TEXT = 1 << 10
"""The longest encrypted share (bytes)."""

TAIL = ("weight", "count", "loss", "loss_count")
"""What follows a site's gradient in a round's sum: its weight, 1, its query loss, and 1 where that is in the mean."""

COUNTS = ("n", "diverged", "helped", "harmed")
"""What the sums of an evaluation begin with, by group of sites."""

SCORE_GROUPS = 2
"""New sites and training sites."""


def scores_size(metrics: int) -> int:
    """Returns how many numbers a site adds to the sums of an evaluation with so many metrics."""
    return SCORE_GROUPS * (len(COUNTS) + 2 * 3 * (1 + metrics))


SECURE = "secure"
"""The record that makes of a request one for masked numbers."""


def _context(record: ConfigRecord) -> str:
    context = read_scalar(record, "context", str)
    if not 0 < len(context) <= LONGEST_CONTEXT or not context.isprintable():
        raise MessageError("the round has no name of printable characters")
    return context


def _bytes(record: ConfigRecord, key: str, count: int, length: int | None = None) -> list[bytes]:
    values: Any = record.get(key)
    # Flower reads an empty list as one of any type.
    if not isinstance(values, list) or not set(map(type, values)) <= {bytes}:
        raise MessageError(f'"{key}" is not a list of bytes')
    if len(values) != count:
        raise MessageError(f'"{key}" has {len(values)} values and not {count}')
    if any(len(value) != length if length else not 0 < len(value) <= LONGEST_TEXT for value in values):
        raise MessageError(f'"{key}" has a value of another length than it may')
    return values


def _places(record: ConfigRecord, key: str, below: int, count: int | None = None) -> list[int]:
    values = read_list(record, key, int, count)
    if any(not 0 <= value < below for value in values):
        raise MessageError(f'"{key}" has a value that is not between 0 and {below - 1}')
    return values


def _names(record: ConfigRecord, key: str) -> tuple[str, ...]:
    names = tuple(read_list(record, key, str))
    if len(set(names)) < len(names):
        raise MessageError(f'"{key}" has a site twice')
    if bad := first_bad_name(names):
        raise MessageError(f"the site {bad}")
    return names


@dataclass(frozen=True)
class KeysRequest:
    """Asks sites for public keys of a round (step 1).

    Attributes:
        names: The sites.
        context: The run and the round, which every secret is bound to.
    """

    names: tuple[str, ...]
    context: str

    def pack(self) -> RecordDict:
        """Returns the message's content."""
        return RecordDict({"sites": write_names(self.names), "round": ConfigRecord({"context": self.context})})

    @classmethod
    def unpack(cls, content: RecordDict) -> KeysRequest:
        """Reads a message; raises `MessageError` where it is not one."""
        only(content, "sites", "round")
        return cls(read_names(content), _context(read_record(content, "round", ConfigRecord, "context")))


@dataclass(frozen=True)
class KeysReply:
    """Public X25519 keys of sites, made for one round.

    Attributes:
        names: The sites.
        cipher: By which shares are encrypted for each, 32 bytes.
        mask: By which masks are agreed with each, 32 bytes.
    """

    names: tuple[str, ...]
    cipher: tuple[bytes, ...]
    mask: tuple[bytes, ...]

    def pack(self) -> RecordDict:
        """Returns the reply's content."""
        keys: dict[str, Any] = {"cipher": list(self.cipher), "mask": list(self.mask)}
        return RecordDict({"sites": write_names(self.names), "keys": ConfigRecord(keys)})

    @classmethod
    def unpack(cls, content: RecordDict) -> KeysReply:
        """Reads a reply; raises `MessageError` where it is not one."""
        only(content, "sites", "keys")
        names = read_names(content)
        keys = read_record(content, "keys", ConfigRecord, "cipher", "mask")
        found = [_bytes(keys, key, len(names), KEY_BYTES) for key in ("cipher", "mask")]
        return cls(names, tuple(found[0]), tuple(found[1]))


@dataclass(frozen=True)
class SharesRequest:
    """Asks sites to share their secrets among their neighbors (step 2).

    Attributes:
        names: The sites asked.
        context: The run and the round.
        sites: How many sites the round's ring has.
        degree: How many neighbors each has.
        needed: How many shares give a secret back.
        known: The sites asked and their neighbors.
        places: The place of each of `known` in the ring.
        cipher: Their public keys for shares.
        mask: Their public keys for masks.
    """

    names: tuple[str, ...]
    context: str
    sites: int
    degree: int
    needed: int
    known: tuple[str, ...]
    places: tuple[int, ...]
    cipher: tuple[bytes, ...]
    mask: tuple[bytes, ...]

    def pack(self) -> RecordDict:
        """Returns the message's content."""
        ring: dict[str, Any] = {
            "context": self.context,
            "sites": self.sites,
            "degree": self.degree,
            "needed": self.needed,
            "known": list(self.known),
            "places": list(self.places),
            "cipher": list(self.cipher),
            "mask": list(self.mask),
        }
        return RecordDict({"sites": write_names(self.names), "ring": ConfigRecord(ring)})

    @classmethod
    def unpack(cls, content: RecordDict) -> SharesRequest:
        """Reads a message; raises `MessageError` where it is not one."""
        only(content, "sites", "ring")
        keys = ("context", "sites", "degree", "needed", "known", "places", "cipher", "mask")
        ring = read_record(content, "ring", ConfigRecord, *keys)
        sites, degree, needed = (read_scalar(ring, key, int) for key in ("sites", "degree", "needed"))
        if not 1 <= sites <= MOST_SITES or not 0 <= degree < sites or not 1 <= needed <= degree + 1:
            raise MessageError("the round's ring, its neighborhoods and the shares needed do not fit together")
        names, known = read_names(content), _names(ring, "known")
        places = _places(ring, "places", sites, len(known))
        if len(set(places)) < len(places) or not set(names) <= set(known):
            raise MessageError("two sites have one place in the ring, or a site that is asked has none")
        found = [_bytes(ring, key, len(known), KEY_BYTES) for key in ("cipher", "mask")]
        return cls(names, _context(ring), sites, degree, needed, known, tuple(places), tuple(found[0]), tuple(found[1]))


@dataclass(frozen=True)
class SharesReply:
    """Shares of sites' secrets, each encrypted for one neighbor.

    Attributes:
        names: The sites that share.
        known: The sites that shares are for.
        senders: Of each share the place in `names` of the site that it is of.
        receivers: The place in `known` of the site that it is for.
        texts: The shares, encrypted.
    """

    names: tuple[str, ...]
    known: tuple[str, ...]
    senders: tuple[int, ...]
    receivers: tuple[int, ...]
    texts: tuple[bytes, ...]

    def pack(self) -> RecordDict:
        """Returns the reply's content."""
        shares: dict[str, Any] = {
            "known": list(self.known),
            "senders": list(self.senders),
            "receivers": list(self.receivers),
            "texts": list(self.texts),
        }
        return RecordDict({"sites": write_names(self.names), "shares": ConfigRecord(shares)})

    @classmethod
    def unpack(cls, content: RecordDict) -> SharesReply:
        """Reads a reply; raises `MessageError` where it is not one."""
        only(content, "sites", "shares")
        names = read_names(content)
        own = read_record(content, "shares", ConfigRecord, "known", "senders", "receivers", "texts")
        known = _names(own, "known")
        senders = _places(own, "senders", len(names))
        receivers = _places(own, "receivers", len(known), len(senders))
        texts = _bytes(own, "texts", len(senders))
        if len(set(zip(senders, receivers, strict=True))) < len(senders):
            raise MessageError("a site shares twice with another")
        return cls(names, known, tuple(senders), tuple(receivers), tuple(texts))

    def by_pair(self) -> dict[tuple[str, str], bytes]:
        """Returns the shares by sender and receiver."""
        pairs = zip(self.senders, self.receivers, self.texts, strict=True)
        return {(self.names[sender], self.known[receiver]): text for sender, receiver, text in pairs}


@dataclass(frozen=True)
class Delivery:
    """The record that makes of a request one for masked numbers (step 3): the shares that neighbors sent.

    Attributes:
        context: The run and the round.
        known: Senders and receivers.
        senders: Of each share the place in `known` of the site that it is of.
        receivers: The place in `known` of the site that it is for.
        texts: The shares, encrypted.
    """

    context: str
    known: tuple[str, ...]
    senders: tuple[int, ...]
    receivers: tuple[int, ...]
    texts: tuple[bytes, ...]

    @classmethod
    def of(cls, context: str, shares: Mapping[tuple[str, str], bytes]) -> Delivery:
        """Returns the record of shares by sender and receiver."""
        known = tuple(sorted({name for pair in shares for name in pair}))
        places = {name: place for place, name in enumerate(known)}
        senders, receivers = (tuple(places[pair[side]] for pair in shares) for side in (0, 1))
        return cls(context, known, senders, receivers, tuple(shares.values()))

    def add_to(self, content: RecordDict) -> RecordDict:
        """Returns a request's content with this record."""
        own: dict[str, Any] = {
            "context": self.context,
            "known": list(self.known),
            "senders": list(self.senders),
            "receivers": list(self.receivers),
            "texts": list(self.texts),
        }
        return RecordDict({**content, SECURE: ConfigRecord(own)})

    @classmethod
    def take_from(cls, content: RecordDict) -> tuple[Delivery, RecordDict]:
        """Returns the record, and the request without it; raises `MessageError` where there is none."""
        own = read_record(content, SECURE, ConfigRecord, "context", "known", "senders", "receivers", "texts")
        known = _names(own, "known")
        senders = _places(own, "senders", len(known))
        receivers = _places(own, "receivers", len(known), len(senders))
        texts = _bytes(own, "texts", len(senders))
        rest = RecordDict({name: record for name, record in content.items() if name != SECURE})
        return cls(_context(own), known, tuple(senders), tuple(receivers), tuple(texts)), rest

    def pack(self) -> RecordDict:
        """Returns a content of this record alone."""
        return self.add_to(RecordDict())

    @classmethod
    def unpack(cls, content: RecordDict) -> Delivery:
        """Reads a content of this record alone; raises `MessageError` where it is not one."""
        only(content, SECURE)
        return cls.take_from(content)[0]

    def received(self, name: str) -> dict[str, bytes]:
        """Returns by sender what is for one site."""
        pairs = zip(self.senders, self.receivers, self.texts, strict=True)
        return {self.known[sender]: text for sender, receiver, text in pairs if self.known[receiver] == name}


@dataclass(frozen=True)
class MaskedReply:
    """Numbers of sites in the ring of 2^64, each site's under its masks.

    Attributes:
        names: The sites.
        numbers: By site [sites, numbers], as the bits of int64.
    """

    names: tuple[str, ...]
    numbers: NDArray[np.uint64]

    def pack(self) -> RecordDict:
        """Returns the reply's content."""
        import torch

        numbers = {"numbers": torch.from_numpy(self.numbers.view(np.int64))}
        return RecordDict({"sites": write_names(self.names), "masked": write_arrays(numbers)})

    @classmethod
    def unpack(cls, content: RecordDict, size: int | None = None) -> MaskedReply:
        """Reads a reply of so many numbers a site (None: any); raises `MessageError` where it is not one."""
        only(content, "sites", "masked")
        names = read_names(content)
        only(read_record(content, "masked", ArrayRecord), "numbers")
        numbers = read_arrays(content, "masked")["numbers"].numpy()
        if numbers.dtype != np.int64 or numbers.ndim != 2 or len(numbers) != len(names):
            raise MessageError("the masked numbers are not int64 by site")
        if size is not None and numbers.shape[1] != size:
            raise MessageError(f"there are {numbers.shape[1]} masked numbers and not {size}")
        return cls(names, numbers.view(np.uint64))


@dataclass(frozen=True)
class UnmaskRequest:
    """Asks sites for their shares of what does not cancel (step 4).

    Attributes:
        names: The sites asked.
        context: The run and the round.
        left: How many sites sent their numbers.
        seeds: Sites that sent numbers, whose seeds are wanted of those who have a share.
        keys: Sites that shared and then sent none, whose mask keys are wanted.
    """

    names: tuple[str, ...]
    context: str
    left: int
    seeds: tuple[str, ...]
    keys: tuple[str, ...]

    def pack(self) -> RecordDict:
        """Returns the message's content."""
        wanted: dict[str, Any] = {
            "context": self.context,
            "left": self.left,
            "seeds": list(self.seeds),
            "keys": list(self.keys),
        }
        return RecordDict({"sites": write_names(self.names), "wanted": ConfigRecord(wanted)})

    @classmethod
    def unpack(cls, content: RecordDict) -> UnmaskRequest:
        """Reads a message; raises `MessageError` where it is not one."""
        only(content, "sites", "wanted")
        wanted = read_record(content, "wanted", ConfigRecord, "context", "left", "seeds", "keys")
        left = read_scalar(wanted, "left", int)
        if not 0 <= left <= MOST_SITES:
            raise MessageError(f"the number of sites that are left is not between 0 and {MOST_SITES}")
        seeds, keys = _names(wanted, "seeds"), _names(wanted, "keys")
        if set(seeds) & set(keys):
            raise MessageError("both secrets of one site are asked for")
        return cls(read_names(content), _context(wanted), left, seeds, keys)


@dataclass(frozen=True)
class UnmaskReply:
    """Shares that sites hand over.

    Attributes:
        names: The sites that hand over.
        known: The sites whose secrets the shares are of.
        holders: Of each share the place in `names` of who had it.
        owners: The place in `known` of the site whose secret it is of.
        shares: The shares, 33 bytes each.
    """

    names: tuple[str, ...]
    known: tuple[str, ...]
    holders: tuple[int, ...]
    owners: tuple[int, ...]
    shares: tuple[bytes, ...]

    def pack(self) -> RecordDict:
        """Returns the reply's content."""
        own: dict[str, Any] = {
            "known": list(self.known),
            "holders": list(self.holders),
            "owners": list(self.owners),
            "shares": list(self.shares),
        }
        return RecordDict({"sites": write_names(self.names), "shares": ConfigRecord(own)})

    @classmethod
    def unpack(cls, content: RecordDict) -> UnmaskReply:
        """Reads a reply; raises `MessageError` where it is not one."""
        only(content, "sites", "shares")
        names = read_names(content)
        own = read_record(content, "shares", ConfigRecord, "known", "holders", "owners", "shares")
        known = _names(own, "known")
        holders = _places(own, "holders", len(names))
        owners = _places(own, "owners", len(known), len(holders))
        shares = _bytes(own, "shares", len(holders), BYTES)
        if len(set(zip(holders, owners, strict=True))) < len(holders):
            raise MessageError("a site hands over two shares of one secret")
        return cls(names, known, tuple(holders), tuple(owners), tuple(shares))

    def by_holder(self) -> dict[str, dict[str, bytes]]:
        """Returns the shares by holder and owner."""
        found: dict[str, dict[str, bytes]] = {name: {} for name in self.names}
        for holder, owner, share in zip(self.holders, self.owners, self.shares, strict=True):
            found[self.names[holder]][self.known[owner]] = share
        return found


def places_of(pairs: Sequence[tuple[str, str]], first: Sequence[str]) -> tuple[tuple[str, ...], list[int], list[int]]:
    """Returns the second names of pairs, each once, and the places of both names of each pair."""
    second = tuple(sorted({pair[1] for pair in pairs}))
    at, other = ({name: place for place, name in enumerate(names)} for names in (first, second))
    return second, [at[pair[0]] for pair in pairs], [other[pair[1]] for pair in pairs]
