"""The Flower ClientApp: unpack the message, call the cohort engine, pack the reply."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import wraps

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from clients import secure, stream
from clients.compressed import packed_reply
from clients.downlink import NoStateError, with_state
from clients.errors import DataError, UnknownSiteError
from clients.evaluation import Evaluator, Floats, evaluate_sites
from clients.local_state import LocalStateStore, StorageError
from clients.node import Node, RowNode, learner_for, node_of, split_meta_state
from clients.policy import ROUNDED, Policy, PolicyError, count_request, policy_of
from clients.secure_scores import score_numbers
from fedmeta import engines
from fedmeta.data import Standardisation
from fedmeta.engines.personal_state import stack_personal, train_personal
from fedmeta.engines.weighted_sum import in_site_order, join_parts
from fedmeta.errors import FedmetaError
from fedmeta.learners.order import in_order
from fedmeta.messages import (
    CategoriesReply,
    CategoriesRequest,
    EngineReply,
    MessageError,
    NormsReply,
    RoundRequest,
    SumsReply,
    SumsRequest,
    TrainReply,
    pack_failure,
)
from fedmeta.messages.downlink import BASE
from fedmeta.messages.secure import Delivery, KeysRequest
from fedmeta.secure import ring
from fedmeta.secure.ring import RangeError
from fedmeta.secure.site import ProtocolError

log = logging.getLogger("fedmeta.client")
app = ClientApp()

CODES: dict[type[BaseException], str] = {
    DataError: "bad-data",
    UnknownSiteError: "unknown-site",
    StorageError: "bad-storage",
    PolicyError: "beyond-policy",
    MessageError: "bad-message",
    NoStateError: "no-state",
    FedmetaError: "bad-experiment",
    ProtocolError: "secure-refused",
    RangeError: "beyond-range",
    MemoryError: "out-of-memory",
    torch.OutOfMemoryError: "out-of-memory",
    Exception: "internal",
}
"""Which code a node replies with for which error; the first that fits."""


def error_coded(answer: Callable[[RecordDict, Context], RecordDict]) -> Callable[[Message, Context], Message]:
    """Returns a handler that turns every error into a code: an error's text, which may hold data, stays in the log."""

    # Under the name by which it is imported: Ray then sends that name to its workers, and not the handler's code.
    @wraps(answer)
    def handle(message: Message, context: Context) -> Message:
        try:
            content = answer(message.content, context)
        except Exception as error:
            code = next(code for kind, code in CODES.items() if isinstance(error, kind))
            log.error("fedmeta: %s: %s", code, error, exc_info=code == "internal")
            content = pack_failure(code)
        return Message(content, reply_to=message)

    return handle


@app.query("sites")
@error_coded
def sites(content: RecordDict, context: Context) -> RecordDict:
    """Reports which sites are here, how many rows they have, and their schema."""
    return node_of(context).describe().pack()


@app.query("categories")
@error_coded
def categories(content: RecordDict, context: Context) -> RecordDict:
    """Names the categories that enough train rows of a training site have."""
    node, policy, request = node_of(context), policy_of(context.node_config), CategoriesRequest.unpack(content)
    here = node.find(request.names)
    if policy and isinstance(node, RowNode):
        policy.check_sums(node.split.train_sizes(here))
    return CategoriesReply(node.categories(here, request.columns)).pack()


@app.query("sums")
@error_coded
def sums(content: RecordDict, context: Context) -> RecordDict:
    """Adds up the features and targets of training sites, or each site's own."""
    node, policy, request = node_of(context), policy_of(context.node_config), SumsRequest.unpack(content)
    node = node.with_categories(request.categories)
    here = node.find(request.names)
    if policy and isinstance(node, RowNode):
        policy.check_sums(node.split.train_sizes(here))
    parts = [here[place : place + 1] for place in range(len(here))] if request.per_site else [here]
    every = [(node.sums(part), node.target_sums(part)) for part in parts]
    own = [[value for sums in found for value in (sums.count, sums.total, sums.square)] for found in every]
    if not request.per_site:
        return SumsReply(*own[0]).pack()
    return SumsReply(*(np.stack(values) for values in zip(*own, strict=True))).pack()


@app.query("engine")
@error_coded
def engine(content: RecordDict, context: Context) -> RecordDict:
    """Reports which cohort engine is fastest here for the first cohort, and how much memory it may take."""
    node, request = _node_and_request(content, context)
    policy = _granted(node, context, request)
    _configure_runtime(node.experiment.runtime.threads)
    meta_state, scale = _meta_state(node, request)
    learner = learner_for(node, request.classes)
    here = node.find(request.names)
    _, batch = next(node.training_batches(here, request.round_number, scale, request.classes, learner.minibatches))
    if policy:
        policy.check_rows(batch, test=False)
    chosen, seconds = engines.trial(learner, meta_state, batch)
    runtime = node.experiment.runtime
    return EngineReply(chosen, memory_budget(runtime.memory, runtime.device), seconds).pack()


@app.query("keys")
@error_coded
def keys(content: RecordDict, context: Context) -> RecordDict:
    """Makes keys of a round for secure sums."""
    node_of(context).find(KeysRequest.unpack(content).names)
    return secure.keys(content, context)


@app.query("shares")
@error_coded
def shares(content: RecordDict, context: Context) -> RecordDict:
    """Shares sites' secrets of a round among their neighbors."""
    return secure.shares(content, context, node_of(context).experiment)


@app.query("unmask")
@error_coded
def unmask(content: RecordDict, context: Context) -> RecordDict:
    """Hands over shares of what does not cancel in a secure sum."""
    return secure.unmask(content, context)


@app.query("masked_sums")
@error_coded
def masked_sums(content: RecordDict, context: Context) -> RecordDict:
    """Adds up the features and targets of training sites, under masks."""
    delivery, content = Delivery.take_from(content)
    node, policy, request = node_of(context), policy_of(context.node_config), SumsRequest.unpack(content)
    node = node.with_categories(request.categories)
    here = node.find(request.names)
    if policy and isinstance(node, RowNode):
        policy.check_sums(node.split.train_sizes(here))
    own = [
        np.concatenate(
            [
                value.ravel()
                for sums in (node.sums(part), node.target_sums(part))
                for value in (sums.count, sums.total, sums.square)
            ]
        )
        for part in (here[place : place + 1] for place in range(len(here)))
    ]
    quantum = node.experiment.privacy.quantum
    return secure.masked(
        delivery, context, request.names, lambda sites: ring.encode_wide(np.stack(own), quantum, sites)
    )


@app.query("norms")
@error_coded
def norms(content: RecordDict, context: Context) -> RecordDict:
    """Reports how long the meta-gradient of each training site that is here is in a round."""
    node, request = _node_and_request(content, context)
    policy = _granted(node, context, request)
    _configure_runtime(node.experiment.runtime.threads)
    here = node.find(request.names)
    meta_state, scale = _meta_state(node, request)
    learner = learner_for(node, request.classes).for_round(request.round_number, node.experiment.server.rounds)
    found = np.zeros(len(here))
    for group, batch in node.training_batches(here, request.round_number, scale, request.classes, learner.minibatches):
        if policy:
            policy.check_rows(batch, test=False)
        budget, check = request.budget or engines.BUDGET, node.experiment.runtime.check
        own = engines.gradient_norms(learner, meta_state, batch, request.engine, budget=budget, check=check)
        found[group] = own.cpu().numpy()
    if policy and policy.metrics == ROUNDED:
        # Significant digits: decimals would make a short gradient none, and its site would never be drawn.
        found = np.array([float(f"{norm:.3g}") for norm in found.tolist()])
    return NormsReply(request.names, found).pack()


@app.train()
@error_coded
def train(content: RecordDict, context: Context) -> RecordDict:
    """Computes the weighted sum of the meta-gradients of the cohort's sites that are here, or each site's own."""
    node, request = _node_and_request(content, context)
    policy = _granted(node, context, request)
    packs = node.experiment.server.compression != "none"
    per_site = request.per_site or packs
    gradient, weight, metrics, _ = _train(node, request, context, policy, per_site=per_site, rounded=request.per_site)
    query_loss = metrics["query_loss"].cpu().numpy()
    reply = TrainReply(
        gradient=gradient,
        weight=weight,
        names=request.names,
        query_loss=policy.figures(query_loss) if policy else query_loss,
        finite=metrics["finite"].cpu().numpy().astype(bool),
    )
    return packed_reply(reply, context, node.experiment, request) if packs else reply.pack()


@app.train("masked")
@error_coded
def train_masked(content: RecordDict, context: Context) -> RecordDict:
    """Computes what `train` does, and replies with each site's share of the sum under masks."""
    delivery, content = Delivery.take_from(content)
    node, request = _node_and_request(content, context)
    policy = _granted(node, context, request)
    gradient, _, metrics, weights = _train(node, request, context, policy, per_site=True, rounded=False)
    losses = metrics["query_loss"].double().cpu().numpy()
    finite = metrics["finite"].cpu().numpy().astype(bool)
    return secure.masked(
        delivery,
        context,
        request.names,
        lambda sites: secure.training_numbers(node.experiment, sites, gradient, weights, losses, finite),
    )


def _train(
    node: Node, request: RoundRequest, context: Context, policy: Policy | None, *, per_site: bool, rounded: bool
) -> tuple[dict[str, Tensor], float, dict[str, Tensor], Tensor]:
    """Returns the sites' sum or their own gradients, the weight of the sum, figures, and each site's weight."""
    _configure_runtime(node.experiment.runtime.threads)
    here = node.find(request.names)
    meta_state, scale = _meta_state(node, request)
    learner = learner_for(node, request.classes).for_round(request.round_number, node.experiment.server.rounds)
    learner = in_order(learner, request.order)
    weights, clip_norm = node.weights(here), node.experiment.privacy.clip_norm
    kept = LocalStateStore.of(context, node.experiment, request) if learner.personal(meta_state) else None
    before, after, parts = kept.read() if kept else [], [], []
    batches = node.training_batches(here, request.round_number, scale, request.classes, learner.minibatches)
    for group, batch in batches:
        if policy:
            policy.check_rows(batch, test=False)
        if kept:
            own = stack_personal(learner, meta_state, [before[site] for site in group.tolist()])
            gradient, weight, metrics, own = train_personal(
                learner, meta_state, batch, weights[group], own, clip_norm=clip_norm, per_site=per_site
            )
            after.append(own)
        else:
            gradient, weight, metrics = engines.meta_gradients(
                learner,
                meta_state,
                batch,
                request.engine,
                weights=weights[group],
                budget=request.budget or engines.BUDGET,
                rounded=rounded,
                clip_norm=clip_norm,
                per_site=per_site,
                check=node.experiment.runtime.check,
            )
        parts.append((group, gradient, weight, metrics))
    gradient, weight, metrics = join_parts(parts, per_site)
    if kept:
        kept.write(in_site_order([group for group, *_ in parts], after))
    return gradient, weight, metrics, weights


@app.evaluate()
@error_coded
def evaluate(content: RecordDict, context: Context) -> RecordDict:
    """Scores sites on their test rows, before, during and after adaptation on their support rows."""
    node, request = _node_and_request(content, context)
    policy = _granted(node, context, request, evaluation=True)
    _configure_runtime(node.experiment.runtime.threads)
    here = node.find(request.names)
    meta_state, scale = _meta_state(node, request)
    learner = learner_for(node, request.classes)
    keeps = learner.personal(meta_state) and not request.baseline
    kept = LocalStateStore.of(context, node.experiment, request).read(after_round=True) if keeps else None
    evaluator = Evaluator.of(learner, meta_state, request)
    losses: dict[int, Floats] = {}
    reply = evaluate_sites(node, here, request, evaluator, scale, kept, policy, losses)
    alarms = stream.remember(node, context, request, [losses.get(place, np.empty(0)) for place in range(len(here))])
    return replace(reply, alarms=alarms).pack()


@app.evaluate("masked")
@error_coded
def evaluate_masked(content: RecordDict, context: Context) -> RecordDict:
    """Scores sites as `evaluate` does, and replies with each site's share of its group's sums under masks."""
    delivery, content = Delivery.take_from(content)
    node, request = _node_and_request(content, context)
    policy = _granted(node, context, request, evaluation=True)
    _configure_runtime(node.experiment.runtime.threads)
    meta_state, scale = _meta_state(node, request)
    learner = learner_for(node, request.classes)
    keeps = learner.personal(meta_state)
    kept = LocalStateStore.of(context, node.experiment, request).read(after_round=True) if keeps else None
    groups = request.groups or (-1,) * len(request.names)
    alone = replace(request, groups=())  # sums over rows are not asked for
    reply = evaluate_sites(
        node, node.find(request.names), alone, Evaluator.of(learner, meta_state, alone), scale, kept, policy
    )
    own = score_numbers(reply, groups, learner.problem.metrics)
    quantum = node.experiment.privacy.quantum
    return secure.masked(delivery, context, request.names, lambda sites: ring.encode_wide(own, quantum, sites))


def _node_and_request(content: RecordDict, context: Context) -> tuple[Node, RoundRequest]:
    """Returns the node, its rows with the features that the run has, and what is asked of it."""
    node = node_of(context)
    if BASE in content:
        content = with_state(content, context, node.experiment)
    request = RoundRequest.unpack(content)
    return stream.at_step(node.with_categories(request.categories), context, request), request


def _granted(node: Node, context: Context, request: RoundRequest, *, evaluation: bool = False) -> Policy | None:
    """Returns the site's policy, None in simulation, once a request was held against it and counted."""
    policy = policy_of(context.node_config)
    if policy:
        policy.check_steps(node.experiment, request)
        count_request(policy, context, request.run, evaluation=evaluation)
    return policy


def _meta_state(node: Node, request: RoundRequest) -> tuple[dict[str, Tensor], Standardisation]:
    """Returns the learned part of a request's meta-state, and its standardisation."""
    log = node.experiment.target_kind == "log"
    return split_meta_state(request.meta_state, node.experiment.runtime.device, log_targets=log)


def memory_budget(gib: float, device: str = "cpu") -> int:
    """Returns the bytes that one cohort may take: as set, or a sixteenth of what is free on the device.

    At least 64 MiB; on a processor at most 512 MiB, for what stays in its caches counts.
    """
    if gib:
        return int(gib * (1 << 30))
    if device == "cuda":
        return max(torch.cuda.mem_get_info()[0] // 16, 1 << 26)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(max(free // 16, 1 << 26), 1 << 29)


def _configure_runtime(threads: int) -> None:
    if threads and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
