"""A node's side of compression: packs each site's gradient, and keeps at the site what top-k did not send."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from flwr.app import Context, RecordDict

from clients.local_state import LocalStateStore, read, write
from fedmeta.compression import pack, unpack
from fedmeta.experiment import Experiment
from fedmeta.messages import RoundRequest, TrainReply
from fedmeta.messages.compressed import pack_reply
from fedmeta.randomness import generator

RESIDUAL = "residual"
"""What a site keeps under this name: the part of its gradients that was not sent yet."""


def packed_reply(reply: TrainReply, context: Context, experiment: Experiment, request: RoundRequest) -> RecordDict:
    """Returns the content of a reply of sites' own gradients, packed as the experiment has it.

    With top-k each site adds what it kept before, and keeps what is not sent now (error feedback, Stich 2018), in the
    folder where personal parameters lie: it survives a restart of the site, and a run that resumes from an earlier
    round finds that round's.
    """
    server, seed = experiment.server, experiment.runtime.seed
    names = sorted(reply.gradient)
    flat = np.concatenate(
        [reply.gradient[name].double().cpu().numpy().reshape(len(reply.names), -1) for name in names], axis=1
    )
    random = [generator(seed, "compression", request.round_number, name) for name in reply.names]
    folder: Path | None = None
    if server.compression == "top-k":
        store = LocalStateStore.of(context, experiment, request)
        folder = store.folder / "unsent"
        before = [read(folder, name, request.round_number) for name in reply.names]
        for row, own in enumerate(before):
            if own is not None and own[RESIDUAL].shape == flat[row].shape and reply.finite[row]:
                flat[row] += own[RESIDUAL].double().numpy()
    arrays = pack(flat, server.compression, server.compression_keep, random)
    if folder is not None:
        sent = unpack(arrays, server.compression, server.compression_keep, *flat.shape)
        for row, name in enumerate(reply.names):
            if reply.finite[row]:
                own = {RESIDUAL: torch.from_numpy((flat[row] - sent[row]).astype(np.float32))}
                write(folder, name, request.round_number, own, request.saved_rounds)
    return pack_reply(arrays, reply)
