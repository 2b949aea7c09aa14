"""Tracks node membership: joins, reconnects under a new id, failures, duplicate site claims."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedmeta.checkpoint import Checkpoint
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.messages import QUERY_SITES, MessageError, SitesReply
from server import schema, site_keys
from server.federation import NO_NODE, Federation, add_sites, build_federation, only, uses_validation_sites
from server.site_statistics import ask

POLL_S = 3.0
"""How long to wait before asking again who is there, while sites that must be present are missing."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 10.0, 600.0
"""How long a node that could not report whom it hosts, or may not, is left alone before it is asked again."""

BACKOFF_FACTOR = 4.0
"""How many times as long as it took to fail a node is left alone at least: one that hangs must not hold up the rest."""

LEFT_OUT = "the run is without it: data.without names it"

DUPLICATE_SITE = "another node serves this site too; stop one of the two"


@dataclass(frozen=True)
class Backoff:
    """When a node is asked again, and how long it was left alone for that."""

    until: float
    seconds: float


class Membership:
    """Keeps a federation up to date while nodes come and go."""

    def __init__(self, grid: Grid, experiment: Experiment, earlier: Checkpoint | None = None) -> None:
        """Waits for the sites that must be present.

        Args:
            grid: Flower's grid.
            experiment: The run's description.
            earlier: The checkpoint to resume from: all its sites are waited for, and what it fixed stays.

        Sites whose rows have another form than most nodes' are refused, and the others continue. A run that
        resumes from a checkpoint does so after `server.round_timeout` also without those of its sites that are lost.

        Raises:
            FedmetaError: No node answered, or sites that must be present are missing after `server.round_timeout` or
                refused.
        """
        self._grid = grid
        self._experiment = experiment
        self._earlier = earlier
        self._seen: set[int] = set()
        self._paused: dict[int, Backoff] = {}
        self._keys = site_keys.keys_file()
        self._impostors: dict[str, str] = {}
        self._left_out: dict[str, str] = {}
        self.notes: list[str] = []
        self.refused: dict[str, str] = {}
        self.federation = self._assemble()
        absent = [self.federation.names[site] for site in np.flatnonzero(self.federation.node_ids == NO_NODE)]
        self.absent = [name for name in absent if name not in self.refused]

    def poll_new_nodes(self) -> list[str]:
        """Asks nodes that were not there before which sites they host; returns notes about them."""
        fresh = self._pending_nodes()
        return self._register(fresh) if fresh else []

    def _pending_nodes(self) -> set[int]:
        """Returns the nodes to ask: those that were not there before, and those whose pause is over."""
        now = time.monotonic()
        left_alone = {node for node, pause in self._paused.items() if now < pause.until}
        return set(self._grid.get_node_ids()) - self._seen - left_alone

    def _assemble(self) -> Federation:
        required, earlier = self._experiment.server.wait_for, self._earlier
        wanted = earlier.names if earlier else required
        # Where all sites live in this process no other node will come, however long one waits.
        patience = 0.0 if getattr(self._grid, "complete", False) else self._experiment.server.round_timeout
        deadline = time.monotonic() + patience
        replies: dict[int, SitesReply] = {}
        problems: dict[int, str] = {}
        while True:
            answers, failed = self._ask_sites(self._pending_nodes())
            problems |= failed
            node_ids = {name: node for node, reply in replies.items() for name in reply.names}
            contested = self._duplicate_claims(node_ids, answers)
            for node, reply in answers.items():
                if node not in contested:
                    for gone in {node_ids[name] for name in reply.names if name in node_ids}:
                        del replies[gone]
                    replies[node] = reply
            accepted, self.refused = schema.select_majority_schema(replies, earlier)
            for node, why in schema.excess_classes({} if earlier else accepted).items():
                self.refused.update(dict.fromkeys(accepted.pop(node).names, why))
            for node, why in schema.text_where_numbers({} if earlier else accepted).items():
                self.refused.update(dict.fromkeys(accepted.pop(node).names, why))
            for reasons in contested.values():
                self.refused |= reasons
            self.refused |= self._impostors | self._left_out
            present = [name for reply in accepted.values() for name in reply.names]
            over = time.monotonic() >= deadline
            # What a checkpoint holds of its sites is enough to continue without those that are lost.
            missing = _missing(required if over and earlier and earlier.train_rows else wanted, present)
            if accepted and not missing:
                federation = build_federation(accepted, self._experiment, earlier)
                self.notes = [note for reply in accepted.values() for note in _changed(federation, reply)]
                return federation
            needed = [] if isinstance(required, int) else [name for name in required if name in self.refused]
            all_refused = earlier is not None and set(earlier.names) <= self.refused.keys()
            if needed or all_refused or over or (problems and not replies and not wanted):
                raise FedmetaError(_no_sites_error([*problems.values()], missing, self.refused, bool(replies)))
            time.sleep(POLL_S)

    def _ask_sites(self, nodes: set[int]) -> tuple[dict[int, SitesReply], dict[int, str]]:
        """Returns what nodes host, and why the others could not; those are asked again later."""
        started = time.monotonic()
        self._seen |= nodes
        answers: dict[int, SitesReply] = {}
        problems: dict[int, str] = {}
        contents = {node: RecordDict() for node in nodes}
        for node, content in ask(self._grid, contents, QUERY_SITES, self._experiment.server.round_timeout).items():
            try:
                if isinstance(content, str):
                    raise MessageError(content)
                reply = SitesReply.unpack(content)
                if left_out := set(reply.names) & set(self._experiment.data.without):
                    self._left_out |= dict.fromkeys(sorted(left_out), LEFT_OUT)
                    continue
                answers[node] = reply
            except MessageError as error:
                problems[node] = f"node {node}: {error}"
                self._pause(node, time.monotonic() - started)
        return answers, problems

    def _pause(self, node: int, took: float = 0.0) -> None:
        """Leaves a node alone for a while, longer each time."""
        before = self._paused.get(node)
        seconds = min(2 * before.seconds, LONGEST_PAUSE_S) if before else FIRST_PAUSE_S
        seconds = max(seconds, BACKOFF_FACTOR * took)
        self._paused[node] = Backoff(time.monotonic() + seconds, seconds)
        self._seen.discard(node)

    def _duplicate_claims(
        self, node_ids: Mapping[str, int], answers: Mapping[int, SitesReply]
    ) -> dict[int, dict[str, str]]:
        """Returns the nodes among those that answered that may not have the names they bring, and who is refused why.

        Where nodes have keys, a name belongs to one (`server.site_keys`), and the node is refused under its number: the
        name's own node continues. Else a name that another living node serves too is refused at both; a node that comes
        back under another id is none of these, since the one that it was does not answer any more.

        Args:
            node_ids: The node of each site so far.
            answers: What nodes host that were not there before.
        """
        if self._keys:
            found = site_keys.claim(self._keys, {node: reply.names for node, reply in answers.items()})
            refused = {node: {f"node {node}": _claims(names)} for node, names in found.items()}
            for node, reasons in refused.items():
                self._impostors |= reasons
                self._pause(node)
            return refused
        claims: dict[str, list[int]] = {}
        if node_ids or len(answers) > 1:
            for node, reply in answers.items():
                for name in reply.names:
                    claims.setdefault(name, []).append(node)
        alive = self._alive({node_ids[name] for name in claims if name in node_ids})
        contested: dict[int, dict[str, str]] = {}
        for name, nodes in claims.items():
            if len(nodes) > 1 or node_ids.get(name) in alive:
                for node in nodes:
                    contested.setdefault(node, {})[name] = DUPLICATE_SITE
        for node in contested:
            self._pause(node)
        return contested

    def _alive(self, nodes: set[int]) -> set[int]:
        """Returns those of some nodes that answer now."""
        contents = {node: RecordDict() for node in nodes and nodes & set(self._grid.get_node_ids())}
        if not contents:
            return set()
        answers = ask(self._grid, contents, QUERY_SITES, self._experiment.server.round_timeout)
        return {node for node, content in answers.items() if not isinstance(content, str)}

    def _register(self, nodes: set[int]) -> list[str]:
        answers, problems = self._ask_sites(nodes)
        self.refused |= self._left_out
        notes = [problem for node, problem in problems.items() if self._paused[node].seconds <= FIRST_PAUSE_S]
        federation = self.federation
        node_ids = dict(zip(federation.names, federation.node_ids.tolist(), strict=True)) if answers else {}
        for node, reasons in self._duplicate_claims(node_ids, answers).items():
            del answers[node]
            if any(self.refused.get(name) != why for name, why in reasons.items()):
                notes.append(f"refused {', '.join([*reasons][:5])}: {next(iter(reasons.values()))}")
            self.refused |= reasons
        for node, reply in answers.items():
            difference = schema.schema_mismatch(reply, federation)
            if difference:
                self.refused.update(dict.fromkeys(reply.names, difference))
                notes.append(f"refused {', '.join(reply.names[:5])}: {difference}")
                continue
            known = set(federation.names)
            joined = [name for name in reply.names if name not in known]
            if joined and uses_validation_sites(self._experiment):
                notes.append(f"{', '.join(joined[:5])} left out: the run is scored on validation sites")
                federation = only(add_sites(federation, {node: reply}, as_new=True), known)
                continue
            if joined:
                notes.append(
                    f"{', '.join(joined[:5])} joined as {'training' if self._experiment.server.admit else 'new'}"
                )
            notes += _changed(federation, reply)
            federation = add_sites(federation, {node: reply}, as_new=not self._experiment.server.admit)
        self.federation = federation
        return notes


def _claims(names: Mapping[str, str]) -> str:
    """Returns which names a node may not have, and why."""
    return f"it claims {', '.join([*names][:5])}: {next(iter(names.values()))}"


def _changed(federation: Federation, reply: SitesReply) -> list[str]:
    """Returns what to report of sites that come back with other numbers of rows than they joined with."""
    known = dict(zip(federation.names, federation.train_rows.tolist(), strict=True)) if reply.names else {}
    return [
        f"{name} announces {rows} train rows and joined with {known[name]}: the first number stays"
        for name, rows in zip(reply.names, reply.train_rows, strict=True)
        if known.get(name, rows) != rows
    ][:5]


def _missing(wanted: int | Sequence[str], present: Sequence[str]) -> str:
    if isinstance(wanted, int):
        return f"{wanted - len(present)} more sites" if len(present) < wanted else ""
    there = set(present)
    return ", ".join(name for name in wanted if name not in there)


def _no_sites_error(problems: Sequence[str], missing: str, refused: Mapping[str, str], some: bool) -> str:
    """Describes why a run cannot start; `some` is whether at least one node answered."""
    if refused:
        site, difference = next(iter(refused.items()))
        if missing:
            return f"server.wait_for is not met, still missing: {missing}; {site} cannot take part: {difference}"
        return f"no site can take part; {site}: {difference}"
    if problems and not some:
        return f"no node could report which sites it hosts: {problems[0]}"
    if missing:
        return "; ".join([f"server.wait_for is not met, still missing: {missing}", *problems[:1]])
    return "no node is connected"
