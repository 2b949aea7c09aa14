"""FedVARP: the server remembers each site's last update, and a round corrects what it remembers.

Source: Jhunjhunwala, Sharma, Nagarkar and Joshi, "FedVARP: Tackling the variance due to partial client participation
in federated learning", UAI 2022, arXiv 2207.14130, algorithm 2. With y_i the last update of site i (0 before its
first) and U_i those of the cohort S, each of which counts by its factor f_i for all n sites,

    v = mean over all of y_i + sum_{i in S} f_i (U_i - y_i) / n,   then y_i = U_i for i in S

v is as unbiased as the draw is, and its variance is that of U_i - y_i: small once updates change slowly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Memory = dict[str, Tensor]
"""The last update of each site that has sent one, as one vector [values], float32."""


def estimate(
    memory: Mapping[str, Tensor],
    sites: Mapping[str, float],
    updates: Mapping[str, Tensor],
    factors: Mapping[str, float],
) -> Tensor:
    """Returns v [values], in float64.

    Args:
        memory: What the server remembers.
        sites: All training sites, and what each weighs in the mean.
        updates: The updates of the cohort's sites [values].
        factors: By which each of these counts, so that the sum stands for all sites.
    """
    total = sum(sites.values())
    like = next(iter(updates.values()))
    found = torch.zeros_like(like, dtype=torch.float64)
    for name in sorted(sites):
        if name in memory:
            found += sites[name] * memory[name].double()
    for name in sorted(updates):
        change = updates[name].double() - (memory[name].double() if name in memory else 0.0)
        found += factors[name] * sites[name] * change
    return found / total


def remember(memory: Mapping[str, Tensor], updates: Mapping[str, Tensor]) -> Memory:
    """Returns the memory after a round."""
    return {**memory, **{name: value.float() for name, value in updates.items()}}


def flattened(update: Mapping[str, Tensor]) -> Tensor:
    """Returns an update as one vector [values], in float64, by sorted keys: a checkpoint does not keep their order."""
    return torch.cat([update[key].double().reshape(-1) for key in sorted(update)])


def unflattened(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a vector [values] as an update with the keys and shapes of another."""
    keys = sorted(like)
    parts = torch.split(flat, [like[key].numel() for key in keys])
    return {key: part.reshape(like[key].shape) for key, part in zip(keys, parts, strict=True)}


def stacked(memory: Mapping[str, Tensor]) -> tuple[Sequence[str], Tensor | None]:
    """Returns the memory as names and one tensor [sites, values], for a checkpoint; None where it is empty."""
    names = sorted(memory)
    return names, torch.stack([memory[name] for name in names]) if names else None
