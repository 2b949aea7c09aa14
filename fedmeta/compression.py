"""Gradients in fewer bytes: half precision, stochastic quantization, and the largest entries with error feedback.

| name | bytes a number | what |
|---|---|---|
| `float16`, `bfloat16` | 2 | rounded to the nearest; beyond float16's range it is cut to 65504 |
| `int8`, `int4` | 1 + 4/256, 0.5 + 4/256 | blocks of 256 share a scale; rounded at random so that the mean is right |
| `top-k` | 8 x `compression_keep` | the largest entries; the rest is added to the site's next gradient |

Sources: QSGD (Alistarh and others 2017, arXiv 1610.02132) for the quantization; Stich, Cordonnier and Jaggi (2018,
arXiv 1809.07599) for top-k with memory.

Arrays are NumPy's own types: no library for a packing of two numbers in a byte is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
Floats = NDArray[np.float64]

BLOCK = 256
"""So many numbers share a scale."""

LEVELS = {"int8": 127, "int4": 7}
"""The largest code of each."""

LARGEST_HALF = 65504.0
"""The largest number of float16."""


class PackedError(ValueError):
    """Arrays that are not a packed gradient."""


def kept(size: int, keep: float) -> int:
    """Returns how many of so many entries are sent by top-k."""
    return max(1, math.ceil(keep * size))


def pack(values: Floats, method: str, keep: float, random: Sequence[np.random.Generator]) -> Arrays:
    """Returns gradients in fewer bytes.

    Args:
        values: By site [sites, numbers]; finite.
        method: One of the names above.
        keep: The share of entries that top-k sends.
        random: Each site's generator, for rounding at random.
    """
    if method == "float16":
        return {"half": np.clip(values, -LARGEST_HALF, LARGEST_HALF).astype(np.float16)}
    if method == "bfloat16":
        bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
        return {"brain": rounded.astype(np.uint16).view(np.int16)}
    if method == "top-k":
        count = kept(values.shape[1], keep)
        places = np.sort(np.argsort(-np.abs(values), axis=1, kind="stable")[:, :count], axis=1)
        return {"places": places.astype(np.int32), "values": np.take_along_axis(values, places, 1).astype(np.float32)}
    most = LEVELS[method]
    blocks = _in_blocks(values)
    scales = (np.abs(blocks).max(axis=2) / most).astype(np.float32)
    steps = np.divide(blocks, scales[..., None], out=np.zeros_like(blocks), where=scales[..., None] > 0)
    drawn = np.stack([each.random(blocks.shape[1:]) for each in random]) if len(random) else np.zeros_like(blocks)
    codes = np.clip(np.floor(steps + drawn), -most, most).astype(np.int8).reshape(len(values), -1)
    codes = codes[:, : values.shape[1]]
    return {"codes": codes if method == "int8" else _two_in_a_byte(codes), "scales": scales}


def unpack(arrays: Mapping[str, NDArray[Any]], method: str, keep: float, sites: int, size: int) -> Floats:
    """Returns the gradients [sites, numbers] that arrays stand for.

    Args:
        arrays: What `pack` returned.
        method: How it was packed.
        keep: The share of entries that top-k sends.
        sites: How many gradients there must be.
        size: How many numbers each must have.

    Raises:
        PackedError: They are not of this method, number and size, or hold what it cannot.
    """
    blocks, count = -(-size // BLOCK), kept(size, keep)
    forms: dict[str, dict[str, tuple[str, int | tuple[int, ...]]]] = {
        "float16": {"half": ("float16", size)},
        "bfloat16": {"brain": ("int16", size)},
        "int8": {"codes": ("int8", size), "scales": ("float32", blocks)},
        "int4": {"codes": ("uint8", -(-size // 2)), "scales": ("float32", blocks)},
        "top-k": {"places": ("int32", count), "values": ("float32", count)},
    }
    if set(arrays) != set(forms[method]):
        raise PackedError(f"it holds {sorted(arrays)} and not {sorted(forms[method])}")
    for name, (kind, width) in forms[method].items():
        if arrays[name].dtype != np.dtype(kind) or arrays[name].shape != (sites, width):
            raise PackedError(f'"{name}" is not {kind} of shape {(sites, width)}')
    if method == "float16":
        found = arrays["half"].astype(np.float64)
    elif method == "bfloat16":
        found = (arrays["brain"].view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    elif method == "top-k":
        places = arrays["places"]
        if places.size and (places.min() < 0 or places.max() >= size or (np.diff(places, axis=1) <= 0).any()):
            raise PackedError("the places of its entries are not ascending, or are beyond the gradient")
        found = np.zeros((sites, size))
        np.put_along_axis(found, places.astype(np.int64), arrays["values"].astype(np.float64), 1)
    else:
        scales, most = arrays["scales"].astype(np.float64), LEVELS[method]
        codes = arrays["codes"] if method == "int8" else _two_of_a_byte(arrays["codes"], size)
        if (scales < 0).any() or (np.abs(codes.astype(np.int64)) > most).any():
            raise PackedError("a scale is negative, or a code is beyond what there is")
        found = (_in_blocks(codes.astype(np.float64)) * scales[..., None]).reshape(sites, -1)[:, :size]
    if not np.isfinite(found).all():
        raise PackedError("a number is not finite")
    return found


def _in_blocks(values: Floats) -> Floats:
    """Returns rows as blocks [sites, blocks, BLOCK], the last one filled up with zeros."""
    sites, size = values.shape
    padded = np.zeros((sites, -(-size // BLOCK) * BLOCK))
    padded[:, :size] = values
    return padded.reshape(sites, -1, BLOCK)


def _two_in_a_byte(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    shifted = (codes + 8).astype(np.uint8)
    if shifted.shape[1] % 2:
        shifted = np.concatenate([shifted, np.full((len(shifted), 1), 8, np.uint8)], axis=1)
    found: NDArray[np.uint8] = shifted[:, ::2] | (shifted[:, 1::2] << np.uint8(4))
    return found


def _two_of_a_byte(pairs: NDArray[np.uint8], size: int) -> NDArray[np.int8]:
    codes = np.stack([pairs & np.uint8(15), pairs >> np.uint8(4)], axis=2).reshape(len(pairs), -1)[:, :size]
    found: NDArray[np.int8] = codes.astype(np.int8) - np.int8(8)
    return found
