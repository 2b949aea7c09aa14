"""A probe: the round's cohort is computed in another order too, and both gradients are compared."""

from __future__ import annotations

from flwr.serverapp import Grid

from fedmeta.messages import TRAIN
from server.aggregation import Gradient, aggregate_replies
from server.exchange import Shares, messages
from server.order import Probe, compare
from server.run_state import RunState
from server.train_replies import train_replies


def probe(state: RunState, number: int, order: str, shares: Shares, grid: Grid) -> Gradient | None:
    """Returns the aggregate of a round's sites in another order, at the same meta-state; None where none answered."""
    asked = messages(
        grid,
        TRAIN,
        number,
        shares,
        lambda node, names: state.training_content(number, node, names, per_site=state.per_site, order=order),
        state.log,
    )
    usable = train_replies(state, grid.send_and_receive(asked, timeout=state.experiment.server.round_timeout), shares)
    return aggregate_replies(usable, state.experiment.server) if usable else None


def compared(state: RunState, stepped: Gradient, probed: Gradient) -> Probe:
    """Returns what a probe found, of the gradient that the round steps along and the other one."""
    return compare(stepped, probed) if state.order == "first" else compare(probed, stepped)
