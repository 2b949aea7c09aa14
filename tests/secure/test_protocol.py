"""The mathematics of secure sums, without a message."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmeta.secure import masks, ring, shamir, site
from fedmeta.secure.gaussian import discrete_gaussian
from fedmeta.secure.graph import FULL, Graph, graph_of
from fedmeta.secure.server import TooFewError, unmask
from fedmeta.secure.site import Neighbor, ProtocolError, Secrets

QUANTUM = 2.0**-20


class Round:
    """A round among sites in this process, which may drop out after any step."""

    def __init__(self, sites: int, size: int, seed: int = 0) -> None:
        self.names = [f"site-{number:03d}" for number in range(sites)]
        self.graph = graph_of(sites, 0.5)
        self.values = {name: np.random.default_rng([seed, n]).normal(size=size) for n, name in enumerate(self.names)}
        self.secrets = {name: site.begin(name, "a round") for name in self.names}
        self.known = {name: Neighbor(name, place, *self.secrets[name].public) for place, name in enumerate(self.names)}
        self.sent: dict[str, dict[str, bytes]] = {}

    def share(self, names: list[str]) -> None:
        for name in names:
            place = self.known[name].place
            around = [self.known[self.names[other]] for other in self.graph.neighbors(place)]
            self.secrets[name], self.sent[name] = site.share_secrets(self.secrets[name], around, place, self.graph, 0.5)

    def mask(self, names: list[str], shared: list[str]) -> dict[str, ring.Ring]:
        hidden = {}
        for name in names:
            received = {other: self.sent[other][name] for other in shared if name in self.sent[other]}
            numbers = ring.encode(self.values[name], QUANTUM, len(self.names))
            self.secrets[name], hidden[name] = site.masked(self.secrets[name], received, numbers)
        return hidden

    def hand_over(self, names: list[str], left: list[str]) -> dict[str, dict[str, bytes]]:
        handed = {}
        for name in names:
            held = self.secrets[name].shares
            wanted = ([each for each in held if (each in left) is there] for there in (True, False))
            self.secrets[name], handed[name] = site.handed_over(self.secrets[name], len(left), *wanted)
        return handed

    def run(self, shared: list[str], left: list[str], answering: list[str]) -> np.ndarray[Any, Any]:
        self.share(shared)
        hidden = self.mask(left, shared)
        return ring.decode(
            unmask(
                np.sum(list(hidden.values()), axis=0, dtype=np.uint64),
                ring=self.names,
                graph=self.graph,
                context="a round",
                shared=shared,
                left=left,
                public={name: each.mask for name, each in self.known.items()},
                shares=self.hand_over(answering, left),
            ),
            QUANTUM,
        )


def without(names: list[str], share: float, seed: int) -> list[str]:
    lost = random.Random(seed).sample(names, round(share * len(names)))
    return [name for name in names if name not in lost]


@pytest.mark.quick("3-0.0-0", "10-0.3-*", "40-0.3-1")
@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("sites", [3, 10, 40])
def test_the_sum_is_that_of_the_sites_left_at_whichever_step_others_drop_out(
    sites: int, share: float, step: int
) -> None:
    own = Round(sites, 7, seed=step)
    groups, names = [], own.names
    for number in range(3):
        names = without(names, share if number == step else 0.0, seed=sites)
        groups.append(names)
    found = own.run(*groups)
    wanted = sum(own.values[name] for name in groups[1])
    assert np.abs(found - wanted).max() <= len(groups[1]) * QUANTUM / 2


def test_what_one_site_sends_is_nothing_like_its_numbers_and_another_round_sends_other_numbers() -> None:
    one, other = Round(5, 4000), Round(5, 4000)
    hidden = []
    for own in (one, other):
        own.share(own.names)
        hidden.append(own.mask(own.names, own.names))
    clear = ring.encode(one.values["site-000"], QUANTUM, 5)
    bits = np.unpackbits((hidden[0]["site-000"] ^ clear).view(np.uint8))
    assert abs(bits.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(bits))
    assert not (hidden[0]["site-000"] == hidden[1]["site-000"]).any()
    # Of all but one site the sum is under that one's masks too.
    part = np.sum([hidden[0][name] for name in one.names[1:]], axis=0, dtype=np.uint64)
    assert np.abs(ring.decode(part, QUANTUM)).max() > 1e6


def test_too_few_shares_give_nothing_back() -> None:
    own = Round(10, 3)
    with pytest.raises(TooFewError, match="site-000: 4 shares are left of 5"):
        own.run(own.names, own.names, own.names[:4])


@given(st.binary(min_size=32, max_size=32), st.integers(2, 12), st.data())
@settings(max_examples=20)
def test_any_so_many_shares_give_a_secret_back(secret: bytes, needed: int, data: st.DataObject) -> None:
    places = data.draw(st.lists(st.integers(0, 1000), min_size=needed, max_size=14, unique=True))
    shares = shamir.share(secret, places, needed)
    chosen = data.draw(st.permutations(places))[:needed]
    assert shamir.combine({place: shares[place] for place in chosen}, needed) == secret
    with pytest.raises(ValueError, match="shares are left"):
        shamir.combine({place: shares[place] for place in chosen[:-1]}, needed)


def test_a_share_that_was_changed_or_is_for_another_is_refused() -> None:
    own = Round(3, 2)
    own.share(own.names)
    texts = {name: own.sent[name]["site-000"] for name in own.names[1:]}
    numbers = np.zeros(2, dtype=np.uint64)
    swapped = dict(zip(texts, reversed(texts.values()), strict=True))
    changed = {name: text[:-1] + bytes([text[-1] ^ 1]) for name, text in texts.items()}
    for wrong in (swapped, changed):
        with pytest.raises(ValueError, match="changed on its way"):
            site.masked(own.secrets["site-000"], wrong, numbers)


def asked_twice(own: Round) -> None:
    own.hand_over(own.names, own.names)
    own.hand_over(own.names, own.names)


WRONG: dict[str, tuple[Any, str]] = {
    "a step out of order": (lambda own: site.masked(site.begin("a", "b"), {}, np.zeros(1, np.uint64)), "step 3 of"),
    "a step twice": (asked_twice, "step 4 of a round was asked for after step 4"),
    "both secrets": (lambda own: site.handed_over(own.secrets["site-000"], 4, ["site-001"], ["site-001"]), "both"),
    "its own key": (lambda own: site.handed_over(own.secrets["site-000"], 4, [], ["site-000"]), "both secrets"),
    "another's": (lambda own: site.handed_over(own.secrets["site-000"], 4, ["oak"], []), "has no share"),
    "too few left": (lambda own: site.handed_over(own.secrets["site-000"], 1, [], []), "1 sites are left of 4"),
    "fewer than are named": (lambda own: site.handed_over(own.secrets["site-000"], 2, own.names, []), "too few"),
}


@pytest.mark.parametrize(("ask", "message"), WRONG.values(), ids=WRONG)
def test_a_site_refuses_what_would_uncover_numbers(ask: Any, message: str) -> None:
    own = Round(4, 1)
    own.share(own.names)
    own.mask(own.names, own.names)
    with pytest.raises(ProtocolError, match=message):
        ask(own)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda around: around[:-1], "not those of its place"),
        (lambda around: [*around[:-1], Neighbor("site-000", 3, b"1" * 32, b"1" * 32)], "is the site itself"),
        (lambda around: [*around[:-1], Neighbor("x", 3, around[0].cipher, around[0].mask)], "there twice"),
    ],
)
def test_a_site_refuses_neighbors_that_are_not_its_own(change: Any, message: str) -> None:
    own = Round(4, 1)
    around = [own.known[name] for name in own.names[1:]]
    with pytest.raises(ProtocolError, match=message):
        site.share_secrets(own.secrets["site-000"], change(around), 0, own.graph, 0.5)
    with pytest.raises(ProtocolError, match="hides nothing"):
        site.share_secrets(own.secrets["site-000"], around[:1], 0, Graph(2, 1, 2), 0.5)


def test_secrets_survive_as_text() -> None:
    own = Round(4, 1)
    own.share(own.names)
    kept = own.secrets["site-001"]
    assert Secrets.from_text(kept.to_text()) == kept


@pytest.mark.parametrize("sites", [3, FULL, FULL + 1, 100, 1000])
def test_neighbors_are_mutual_and_few(sites: int) -> None:
    graph = graph_of(sites, 0.5)
    around = [set(graph.neighbors(place)) for place in range(sites)]
    assert all(len(own) == graph.degree for own in around)
    assert all(place in around[other] for place in range(sites) for other in around[place])
    masked = [set(graph.masked(place)) for place in range(sites)]
    assert all(place in masked[other] for place in range(sites) for other in masked[place])
    assert graph.degree <= max(FULL - 1, 40)
    assert 2 <= graph.needed <= graph.degree + 1


def test_numbers_are_rounded_to_the_quantum_and_what_is_too_large_is_refused() -> None:
    values = np.array([0.1, -7.3, 1e5, 0.0])
    assert np.abs(ring.decode(ring.encode(values, QUANTUM, 9), QUANTUM) - values).max() <= QUANTUM / 2
    wide = np.array([1e14, -1e12, 0.1, 3.0])
    both = ring.encode_wide(wide, QUANTUM, 9) + ring.encode_wide(-wide + 1, QUANTUM, 9)
    assert np.allclose(ring.decode_wide(both, QUANTUM), 1.0, atol=2 * QUANTUM)
    for wrong in (np.array([2.0**43]), np.array([np.nan]), np.array([np.inf])):
        with pytest.raises(ring.RangeError):
            ring.encode(wrong, QUANTUM, 9)


def test_public_keys_that_give_everybody_the_same_secret_are_refused() -> None:
    with pytest.raises(ValueError, match="shared key"):
        masks.agreed(masks.new_key()[0], bytes(32), "mask", "a round")


@pytest.mark.parametrize("deviation", [0.7, 5.0, 1e9])
def test_the_discrete_gaussian_has_its_moments_and_its_chances(deviation: float) -> None:
    drawn = discrete_gaussian(deviation, 40_000).astype(np.float64)
    far = np.arange(-60, 61) if deviation < 10 else np.array([0])
    weights = np.exp(-(far**2) / (2 * deviation**2))
    wanted = np.sqrt((weights * far**2).sum() / weights.sum()) if deviation < 10 else deviation
    assert abs(drawn.mean()) < 5 * wanted / 200
    assert abs(drawn.std() / wanted - 1) < 5 / np.sqrt(2 * len(drawn))
    if deviation < 10:
        share = weights[far == 0][0] / weights.sum()
        assert abs((drawn == 0).mean() - share) < 5 * np.sqrt(share / len(drawn))
