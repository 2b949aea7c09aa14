"""Score against bytes: each way of `server.compression` on HAR, writers, digits and heart, three seeds.

`python experiments/compression.py [DATA ...] [ROUNDS]` prints a table: new-site accuracy (mean over seeds), bytes that
a site sends in a round, and the share of what float32 takes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from fedmeta import load_experiment, run

HERE = Path(__file__).parent
SEEDS = 3
WAYS = ("none", "float16", "bfloat16", "int8", "int4", "top-k")


def main(names: list[str], rounds: int) -> None:
    """Prints the table of some data sets."""
    print("| data | compression | new sites | difference | bytes of a site and round | of float32 |")
    print("|---|---|---|---|---|---|")
    for name in names:
        plain: list[float] = []
        for way in WAYS:
            scores, sizes = [], []
            for seed in range(SEEDS):
                with tempfile.TemporaryDirectory() as folder:
                    own = [f"runtime.seed={seed}", f"server.compression={way}", "server.compression_keep=0.125"]
                    own += ["evaluation.every=0", "evaluation.local_baseline=none", "tracking.uri=none"]
                    own += [f"tracking.folder={folder}", f"server.rounds={rounds}", "runtime.threads=1"]
                    result = run(load_experiment(HERE / f"{name}.toml", own))
                size = sum(value.numel() for key, value in result.meta_state.items() if key.startswith("theta"))
                scores.append(result.summary["new_sites"]["personalized"]["mean"])
                sizes.append(payload(way, size))
            plain = plain or scores
            lost = 100 * (np.mean(scores) - np.mean(plain))
            share = sizes[0] / payload("none", size)
            print(
                f"| {name} | {way} | {np.mean(scores):.3f} | {lost:+.1f} | {sizes[0]:,.0f} | {share:.2f} |", flush=True
            )


def payload(way: str, size: int) -> float:
    """Returns the bytes of a gradient of so many numbers."""
    from fedmeta.compression import pack

    if way == "none":
        return 4.0 * size
    arrays = pack(np.ones((1, size)), way, 0.125, [np.random.default_rng(0)])
    return float(sum(value.nbytes for value in arrays.values()))


if __name__ == "__main__":
    chosen = [word for word in sys.argv[1:] if not word.isdecimal()] or ["har", "writers", "digits", "heart"]
    main(chosen, next((int(word) for word in sys.argv[1:] if word.isdecimal()), 200))
