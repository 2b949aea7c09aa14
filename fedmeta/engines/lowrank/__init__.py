"""The low-rank engine: a cohort's exact sum of meta-gradients without any site's weights (docs/engine.md).

Callers use what is named here and nothing below it.
"""

from fedmeta.engines.lowrank import engine, ghost_clipping
from fedmeta.engines.lowrank.capture import capture_immediately
from fedmeta.engines.lowrank.engine import evaluate, fits, meta_gradients, plan_of
from fedmeta.engines.lowrank.ghost_clipping import add_sites
from fedmeta.engines.lowrank.trace import ROWS_MIX

__all__ = [
    "ROWS_MIX",
    "add_sites",
    "capture_immediately",
    "engine",
    "evaluate",
    "fits",
    "ghost_clipping",
    "meta_gradients",
    "plan_of",
]
