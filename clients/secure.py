"""A node's part in secure aggregation: its sites' secrets of a round, kept between messages, and masked numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from flwr.app import ConfigRecord, Context, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from fedmeta.experiment import Experiment
from fedmeta.messages.secure import (
    TAIL,
    Delivery,
    KeysReply,
    KeysRequest,
    MaskedReply,
    SharesReply,
    SharesRequest,
    UnmaskReply,
    UnmaskRequest,
    places_of,
)
from fedmeta.secure import ring, site
from fedmeta.secure.gaussian import discrete_gaussian
from fedmeta.secure.graph import Graph, least
from fedmeta.secure.site import Neighbor, ProtocolError, Secrets

STATE = "secure"
"""The record in a node's memory that holds its sites' secrets of one round."""

LARGEST_LOSS = 2.0**20
"""A larger loss is left out of the round's mean, in which it would stand for all others."""

Floats = NDArray[np.float64]


def keys(content: RecordDict, context: Context) -> RecordDict:
    """Step 1: makes keys of a round for each site; secrets of earlier rounds are forgotten."""
    request = KeysRequest.unpack(content)
    secrets = {name: site.begin(name, request.context) for name in request.names}
    _keep(context, request.context, secrets)
    public = [own.public for own in secrets.values()]
    return KeysReply(request.names, tuple(key[0] for key in public), tuple(key[1] for key in public)).pack()


def shares(content: RecordDict, context: Context, experiment: Experiment) -> RecordDict:
    """Step 2: shares each site's secrets among its neighbors."""
    request = SharesRequest.unpack(content)
    secrets = _kept(context, request.context)
    graph = Graph(request.sites, request.degree, request.needed)
    listed = zip(request.known, request.places, request.cipher, request.mask, strict=True)
    known = {name: Neighbor(name, place, cipher, mask) for name, place, cipher, mask in listed}
    by_place = {each.place: each for each in known.values()}
    sent: dict[tuple[str, str], bytes] = {}
    for name in request.names:
        place = known[name].place
        around = [by_place[other] for other in graph.neighbors(place) if other in by_place]
        kept, own = site.share_secrets(_of(secrets, name), around, place, graph, experiment.privacy.survivors)
        secrets[name] = kept
        sent |= {(name, receiver): text for receiver, text in own.items()}
    _keep(context, request.context, secrets)
    receivers, at, to = places_of([*sent], request.names)
    return SharesReply(request.names, receivers, tuple(at), tuple(to), tuple(sent.values())).pack()


def masked(
    delivery: Delivery, context: Context, names: Sequence[str], numbers: Callable[[int], NDArray[np.uint64]]
) -> RecordDict:
    """Step 3: hides each site's numbers.

    Args:
        delivery: What the sites' neighbors shared with them.
        context: The node's.
        names: The sites.
        numbers: Takes how many sites are added up; returns their numbers in the ring [sites, numbers].
    """
    secrets = _kept(context, delivery.context)
    here = [_of(secrets, name) for name in names]
    clear = numbers(max((own.sites for own in here), default=1))
    hidden = np.empty_like(clear)
    for row, own in enumerate(here):
        secrets[own.name], hidden[row] = site.masked(own, delivery.received(own.name), clear[row])
    _keep(context, delivery.context, secrets)
    return MaskedReply(tuple(names), hidden).pack()


def unmask(content: RecordDict, context: Context) -> RecordDict:
    """Step 4: hands over each site's shares of what does not cancel; what is left of the secrets is forgotten."""
    request = UnmaskRequest.unpack(content)
    secrets = _kept(context, request.context)
    found: dict[tuple[str, str], bytes] = {}
    for name in request.names:
        own = _of(secrets, name)
        wanted = ([each for each in names if each in own.shares] for names in (request.seeds, request.keys))
        secrets[name], handed = site.handed_over(own, request.left, *wanted)
        found |= {(name, owner): share for owner, share in handed.items()}
    _keep(context, request.context, secrets)
    owners, at, of = places_of([*found], request.names)
    return UnmaskReply(request.names, owners, tuple(at), tuple(of), tuple(found.values())).pack()


def training_numbers(
    experiment: Experiment,
    sites: int,
    gradients: Mapping[str, Tensor],
    weights: Tensor,
    losses: Floats,
    finite: NDArray[np.bool_],
) -> NDArray[np.uint64]:
    """Returns what each site adds to a round's sum, in the ring [sites, numbers]: its weighted gradient, and `TAIL`.

    A site whose gradient is not finite adds nothing at all, and the sum does not show which one that was. Noise for
    privacy is in the gradient's part: a discrete Gaussian of variance (noise_multiplier clip_norm)^2 / (t - c), so
    that the t sites that must be left, of which c give the server theirs, still add as much as is promised.

    Args:
        experiment: The run's description.
        sites: How many sites are added up.
        gradients: The sites' gradients [sites, ...], shortened where the run asks for that.
        weights: What each weighs [sites].
        losses: Their query losses [sites].
        finite: Whether each gradient is finite [sites].
    """
    privacy = experiment.privacy
    flat = np.concatenate(
        [gradients[name].double().cpu().numpy().reshape(len(finite), -1) for name in sorted(gradients)], axis=1
    )
    own = np.where(finite, weights.double().cpu().numpy(), 0.0)
    counted = finite & (np.abs(np.nan_to_num(losses, nan=np.inf)) <= LARGEST_LOSS)
    ends = {"weight": own, "count": finite, "loss": np.where(counted, losses, 0.0), "loss_count": counted}
    tail = np.stack([ends[name] for name in TAIL], axis=1).astype(np.float64)
    values = np.concatenate([np.where(finite[:, None], flat, 0.0) * own[:, None], tail], axis=1)
    found = ring.encode(values, privacy.quantum, sites)
    if privacy.noise_multiplier:
        count = least(sites, privacy.survivors) - privacy.colluding
        deviation = privacy.noise_multiplier * privacy.clip_norm / count**0.5 / privacy.quantum
        for row in found:
            row[: flat.shape[1]] += discrete_gaussian(deviation, flat.shape[1]).view(np.uint64)
    return found


def _keep(context: Context, name: str, secrets: Mapping[str, Secrets]) -> None:
    text = json.dumps([own.to_text() for own in secrets.values()])
    context.state[STATE] = ConfigRecord({"round": name, "sites": text})


def _kept(context: Context, name: str) -> dict[str, Secrets]:
    record = context.state.get(STATE)
    if not isinstance(record, ConfigRecord) or record.get("round") != name:
        raise ProtocolError(f'the node keeps no secrets of "{name[:80]}": it was restarted, or is in another round')
    return {own.name: own for own in map(Secrets.from_text, json.loads(str(record["sites"])))}


def _of(secrets: Mapping[str, Secrets], name: str) -> Secrets:
    if name not in secrets:
        raise ProtocolError(f'no keys were made for "{name}"')
    return secrets[name]
