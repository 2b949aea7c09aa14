"""A node's reply to `train` with each site's meta-gradient in fewer bytes (`server.compression`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from fedmeta.compression import PackedError, unpack
from fedmeta.messages.records import MessageError, only, read_arrays, read_record, write_arrays
from fedmeta.messages.rounds import TrainReply

PACKED = "packed"


def pack_reply(packed: Mapping[str, NDArray[Any]], reply: TrainReply) -> RecordDict:
    """Returns the content of a reply whose gradient is packed: the arrays, beside the figures of `reply`."""
    content = TrainReply({}, reply.weight, reply.names, reply.query_loss, reply.finite).pack()
    arrays = write_arrays({name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in packed.items()})
    return RecordDict({PACKED: arrays, **{name: own for name, own in content.items() if name != "gradient"}})


def unpack_reply(content: RecordDict, like: Mapping[str, Tensor], method: str, keep: float) -> TrainReply:
    """Reads a reply whose gradients are packed; returns each site's own.

    Args:
        content: The reply's content.
        like: Tensors with the gradient's keys and shapes.
        method: How gradients are packed.
        keep: The share of entries that top-k sends.

    Raises:
        MessageError: It is not one.
    """
    only(content, PACKED, "cohort", "sites")
    read_record(content, PACKED, ArrayRecord)
    rest = {name: own for name, own in content.items() if name != PACKED}
    bare = TrainReply.unpack(RecordDict({"gradient": ArrayRecord(), **rest}), {})
    keys = sorted(like)
    sizes = [like[key].numel() for key in keys]
    arrays = {name: value.numpy() for name, value in read_arrays(content, PACKED).items()}
    try:
        flat = unpack(arrays, method, keep, len(bare.names), sum(sizes))
    except PackedError as error:
        raise MessageError(f"the packed gradient: {error}") from None
    parts = torch.split(torch.from_numpy(flat), sizes, dim=1)
    gradient = {key: part.reshape(len(flat), *like[key].shape) for key, part in zip(keys, parts, strict=True)}
    return TrainReply(gradient, bare.weight, bare.names, bare.query_loss, bare.finite)
