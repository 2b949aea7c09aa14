"""What the server of secure aggregation makes of what came: the sum of the numbers of all sites that sent them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedmeta.secure.graph import Graph
from fedmeta.secure.masks import add_mask, agreed, public_of, stretched
from fedmeta.secure.ring import Ring
from fedmeta.secure.shamir import combine


class TooFewError(ValueError):
    """The secrets of a site cannot be given back: too few of its neighbors are left."""


def unmask(
    total: Ring,
    *,
    ring: Sequence[str],
    graph: Graph,
    context: str,
    shared: Sequence[str],
    left: Sequence[str],
    public: Mapping[str, bytes],
    shares: Mapping[str, Mapping[str, bytes]],
) -> Ring:
    """Returns a sum without the masks that do not cancel in it.

    Args:
        total: The sum of what the sites sent, masked.
        ring: The round's sites in the ring's order.
        graph: The round's neighborhoods.
        context: The run and the round.
        shared: The sites that took part in step 2, whose masks are in the others' numbers.
        left: The sites whose numbers are in the sum.
        public: The public mask key of each site.
        shares: By holder, and then by owner, a share: of the seed of sites that are left, of the mask key of others.

    Raises:
        TooFewError: A secret cannot be given back; the message names its site.
    """
    places = {name: place for place, name in enumerate(ring)}
    clear = total.copy()
    here, there = set(left), set(shared)
    for name in left:
        add_mask(clear, stretched(_secret(name, places, graph, shares), context), -1)
    for name in sorted(there - here):
        neighbors = [ring[place] for place in graph.masked(places[name])]
        masking = [each for each in neighbors if each in here]
        if not masking:
            continue
        key = _secret(name, places, graph, shares)
        if public_of(key) != public[name]:
            raise TooFewError(f"the shares of {name} are not of its key")
        for each in masking:
            # What `each` added for the one that dropped out: with the sign of the site that it came first or second to.
            add_mask(clear, agreed(key, public[each], "mask", context), -1 if each < name else 1)
    return clear


def _secret(name: str, places: Mapping[str, int], graph: Graph, shares: Mapping[str, Mapping[str, bytes]]) -> bytes:
    found = {places[holder]: own[name] for holder, own in shares.items() if name in own}
    try:
        return combine(found, graph.needed)
    except ValueError as error:
        raise TooFewError(f"{name}: {error}") from None
