"""Simulated sites whose rows come in time, with a known change."""

from pathlib import Path

import numpy as np


def switching(
    path: Path, sites: int = 6, rows: int = 120, change: int = 60, seed: int = 0, shift: float = -2.0
) -> Path:
    """Writes sites with a slope each, to which `shift` times itself is added from row `change` on; returns the file."""
    draw = np.random.default_rng(seed)
    slopes = 1.0 + 0.3 * draw.normal(size=(sites, 3))
    x = draw.normal(size=(sites, rows, 3)).astype(np.float32)
    after = (np.arange(rows) >= change)[None, :]
    y = np.einsum("srf,sf->sr", x, slopes) * (1 + shift * after) + 0.2 * draw.normal(size=(sites, rows))
    np.savez(
        path,
        x=x.reshape(-1, 3),
        y=y.reshape(-1),
        site=np.repeat([f"site-{site}" for site in range(sites)], rows),
        time=np.tile(np.arange(rows), sites),
    )
    return path


def settings(path: Path, folder: Path, *more: str) -> list[str]:
    """Returns the keys of a small run on such a file, with blocks of 20 rows."""
    return [
        "data.source=npz", f"data.path={path}", "data.split=time", "data.new_sites=2", "data.support=20",
        "model.name=mlp", "model.hidden=8", "learner.name=maml", "learner.inner_steps=2", "learner.inner_lr=0.05",
        "server.rounds=15", "server.sites_per_round=0", "server.lr=0.02", "evaluation.every=3",
        "evaluation.local_baseline=none", "runtime.engine=loop", "runtime.checkpoint_every=3", "stream.block=20",
        "tracking.uri=none", f"tracking.folder={folder}", *more,
    ]  # fmt: skip
