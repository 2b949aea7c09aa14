"""The program engine: each site's meta-gradient as one straight-line program, sites dealt to workers (docs/engine.md).

Callers use what is named here and nothing below it.
"""

from fedmeta.engines.program.engine import add_sites, evaluate, fits, meta_gradients

__all__ = ["add_sites", "evaluate", "fits", "meta_gradients"]
