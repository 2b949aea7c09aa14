"""A run that starts from an earlier one's meta-state, though sites, columns or classes have changed since.

What fits is taken by its meaning: a weight of a column goes to the column of that name, one of a class to that class.
Which dimensions of a tensor are columns or classes is found by building the model for one more of each, without
storage. What a new column adds begins at 0, so that the model predicts as before until it has learned better; all else
that is new is drawn by the seed, as in any run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedmeta import checkpoint as checkpoints
from fedmeta.build import learner_of
from fedmeta.checkpoint import Checkpoint
from fedmeta.data.columns import feature_names
from fedmeta.data.refusals import listed
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.signing import refuse_checkpoint
from server.federation import Federation

NAMED = 5
"""How many names a note lists."""


class WarmStart(NamedTuple):
    """What a run starts from.

    Attributes:
        state: The meta-state, in the form of this run's.
        facts: The entry "started_from" of the run's summary.
        notes: What was taken and what was not, a sentence each.
    """

    state: dict[str, Tensor]
    facts: dict[str, Any]
    notes: tuple[str, ...]


def warm_start(experiment: Experiment, fresh: Mapping[str, Tensor], federation: Federation) -> WarmStart:
    """Returns the meta-state that `model.start` names, as far as it fits this run.

    Args:
        experiment: The run's description.
        fresh: The meta-state that the run would start from otherwise.
        federation: The run's sites and columns.

    Raises:
        FedmetaError: There is no such run, or nothing of its meta-state fits.
    """
    run = experiment.model.start
    try:
        earlier = checkpoints.newest(checkpoints.find(Path(experiment.tracking.folder), run, ""))[0]
    except FedmetaError as error:
        raise FedmetaError(f'[model] start = "{run}": {error}') from None
    refuse_checkpoint(run)
    before = (
        feature_names(earlier.features, earlier.categories),
        earlier.targets if earlier.regression else earlier.classes,
    )
    now_outputs = federation.targets if federation.regression else federation.classes
    now = feature_names(federation.features, federation.categories), now_outputs
    roles = _roles(experiment, fresh, federation) if before != now else {}
    state: dict[str, Tensor] = {}
    taken: list[str] = []
    for name, value in fresh.items():
        old = earlier.meta_state.get(name)
        known = before == now or name in roles
        found = _fitted(name, value, old, roles.get(name), before, now) if old is not None and known else None
        state[name] = value if found is None else found
        taken += [name] if found is not None else []
    if not taken:
        raise FedmetaError(
            f'[model] start = "{run}": nothing of its meta-state has the names and shapes of this run\'s'
        )
    drawn = [name for name in fresh if name not in taken]
    lost = {
        kind: [name for name in old if name not in set(new)]
        for kind, old, new in zip(("columns", "outputs"), before, now, strict=True)
    }
    added = {
        kind: [name for name in new if name not in set(old)]
        for kind, old, new in zip(("columns", "outputs"), before, now, strict=True)
    }
    seen = _trained(earlier)
    again = [name for name in federation.new_sites if name in seen]
    facts = {
        "run_id": earlier.run_id,
        "rounds": earlier.round_number,
        "tensors_taken": len(taken),
        "tensors_drawn": drawn,
        "columns_added": added["columns"],
        "columns_lost": lost["columns"],
        "outputs_added": added["outputs"],
        "outputs_lost": lost["outputs"],
        "sites_added": [name for name in federation.names if name not in set(earlier.names)],
        "sites_lost": [name for name in earlier.names if name not in set(federation.names)],
        "new_sites_that_trained_it": again,
    }
    return WarmStart(state, facts, tuple(_notes(facts, len(fresh), experiment)))


def _trained(earlier: Checkpoint) -> set[str]:
    """Returns the sites that may have been in a step of a run: all but its new ones, where counts are not known."""
    if earlier.took_part:
        return {name for name, count in zip(earlier.names, earlier.took_part, strict=False) if count}
    return set(earlier.names) - set(earlier.new_sites)


def _roles(experiment: Experiment, fresh: Mapping[str, Tensor], federation: Federation) -> dict[str, str]:
    """Returns of each tensor what its dimensions are: "f" columns, "c" classes or targets, "." anything else."""
    experiment = experiment.without_weights()
    shape, classes, targets = federation.row_shape, federation.classes, len(federation.targets)
    more_classes = (*classes, "".join(classes) + "+") if classes else ()
    with torch.device("meta"):
        wide = (shape[0] + 1,) if len(shape) == 1 else shape
        wider = learner_of(experiment, wide, classes, targets).init(0)
        more = learner_of(experiment, shape, more_classes, targets + bool(not classes)).init(0)
    found = {}
    for name, value in fresh.items():
        if name in wider and name in more and wider[name].dim() == more[name].dim() == value.dim():
            found[name] = "".join(
                "f" if one != own else "c" if deep != own else "."
                for own, one, deep in zip(value.shape, wider[name].shape, more[name].shape, strict=True)
            )
    return found


def _fitted(
    name: str,
    fresh: Tensor,
    old: Tensor,
    role: str | None,
    before: tuple[Sequence[str], Sequence[str]],
    now: tuple[Sequence[str], Sequence[str]],
) -> Tensor | None:
    """Returns an earlier tensor in this run's form, or None where it does not fit.

    Args:
        name: Its name.
        fresh: What the run would start from otherwise.
        old: The earlier tensor.
        role: What its dimensions are (see `_roles`); None where columns and classes are the same.
        before: The earlier run's columns, and its classes or targets.
        now: This run's.
    """
    if old.dtype != fresh.dtype or old.dim() != fresh.dim() or (role is None and old.shape != fresh.shape):
        return None
    if role is None:
        return old.detach().clone()
    places: list[tuple[list[int], list[int]]] = []
    for dim, kind in enumerate(role):
        if kind == ".":
            if old.shape[dim] != fresh.shape[dim]:
                return None
            every = list(range(fresh.shape[dim]))
            places.append((every, every))
            continue
        known, wanted = (before[0], now[0]) if kind == "f" else (before[1], now[1])
        if len(known) != old.shape[dim] or len(wanted) != fresh.shape[dim]:
            return None
        both = [each for each in wanted if each in set(known)]
        places.append(([list(known).index(each) for each in both], [list(wanted).index(each) for each in both]))
    found = torch.zeros_like(fresh) if "f" in role and name.startswith("theta.") else fresh.detach().clone()
    if all(own for own, _ in places):
        source, target = (
            tuple(torch.meshgrid(*(torch.tensor(pair[side]) for pair in places), indexing="ij")) for side in (0, 1)
        )
        found[target] = old[source]
    return found


def _notes(facts: Mapping[str, Any], count: int, experiment: Experiment) -> list[str]:
    drawn = facts["tensors_drawn"]
    notes = [
        f"starts from run {facts['run_id']} after {facts['rounds']} rounds: {facts['tensors_taken']} of {count} "
        f"tensors taken{f'; drawn as in any run: {listed(drawn, NAMED)}' if drawn else ''}. "
        "Not taken: the server's optimizer, what sites kept, scores; features are standardized by this run's sites"
    ]
    for key, words in (
        ("columns_added", "columns that the earlier run lacked begin without effect"),
        ("columns_lost", "columns of the earlier run are gone"),
        ("outputs_added", "classes or targets that it lacked begin as drawn"),
        ("outputs_lost", "classes or targets of it are gone"),
        ("sites_added", "sites that it lacked"),
        ("sites_lost", "sites of it are gone"),
    ):
        if facts[key]:
            notes.append(f"{words}: {listed(facts[key], NAMED)}")
    if facts["new_sites_that_trained_it"]:
        notes.append(
            f"new sites {listed(facts['new_sites_that_trained_it'], NAMED)} trained the earlier run: their scores are "
            "not those of sites that were never seen; name others in data.new_sites"
        )
    if experiment.privacy.noise_multiplier:
        notes.append("epsilon covers this run alone, and not what the earlier run learned of its sites")
    return notes
