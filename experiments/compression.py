"""Score against bytes: each way of `server.compression` on HAR, writers, digits and heart, three seeds.

`python experiments/compression.py [DATA ...] [ROUNDS] [--ways WAY,...]` prints a table: new-site accuracy (mean over
seeds), what it lost, bytes that a site sends in a round, the share of what float32 takes, and bytes to a target: what a
site has sent by the first evaluation (every tenth round) whose score is at most a point below the last one without
compression, of the same seed; the mean over seeds that got there.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from fedmeta import load_experiment, run
from fedmeta.compression import pack

HERE = Path(__file__).parent
SEEDS = 3
WAYS = ("none", "float16", "bfloat16", "int8", "int4", "top-k")
KEEP = 0.125
EVERY = 10
BELOW = 0.01
"""How far below the last score without compression the target is."""


def main(names: list[str], rounds: int, ways: tuple[str, ...]) -> None:
    """Prints the table of some data sets."""
    print(
        "| data | compression | new sites | difference | bytes of a site and round | of float32 | bytes to the target |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in names:
        plain: list[dict[int, float]] = []
        for way in ways:
            courses, size = [], 0
            for seed in range(SEEDS):
                course, size = scored(name, way, seed, rounds)
                courses.append(course)
            plain = plain or courses
            score, before = (np.mean([course[rounds] for course in found]) for found in (courses, plain))
            sent, whole = payload(way, size), payload("none", size)
            reached = [arrival(course, other[rounds] - BELOW) for course, other in zip(courses, plain, strict=True)]
            there = [number * sent for number in reached if number]
            to_target = f"{np.mean(there):,.0f}" + (f" ({len(there)} of {SEEDS})" if len(there) < SEEDS else "")
            print(
                f"| {name} | {way} | {score:.3f} | {100 * (score - before):+.1f} | {sent:,.0f} | {sent / whole:.2f} "
                f"| {to_target if there else 'not reached'} |",
                flush=True,
            )


def scored(name: str, way: str, seed: int, rounds: int) -> tuple[dict[int, float], int]:
    """Returns the new sites' mean accuracy by round, and how many numbers a gradient has."""
    with tempfile.TemporaryDirectory() as folder:
        own = [f"runtime.seed={seed}", f"server.compression={way}", f"server.compression_keep={KEEP}"]
        own += [f"evaluation.every={EVERY}", "evaluation.local_baseline=none", "tracking.uri=none"]
        own += [f"tracking.folder={folder}", f"server.rounds={rounds}", "runtime.threads=1"]
        result = run(load_experiment(HERE / f"{name}.toml", own))
    new = result.history[result.history["kind"] == "new"]
    course = new.groupby("round")["personalized_accuracy"].mean()
    size = sum(value.numel() for key, value in result.meta_state.items() if key.startswith("theta"))
    return {int(number): float(score) for number, score in course.items()}, size


def arrival(course: dict[int, float], target: float) -> int:
    """Returns the first round with a score of at least the target; 0 where there is none."""
    return next((number for number, score in sorted(course.items()) if number and score >= target), 0)


def payload(way: str, size: int) -> float:
    """Returns the bytes of a gradient of so many numbers."""
    if way == "none":
        return 4.0 * size
    arrays = pack(np.ones((1, size)), way, KEEP, [np.random.default_rng(0)])
    return float(sum(value.nbytes for value in arrays.values()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("data", nargs="*", default=[])
    parser.add_argument("--ways", default=",".join(WAYS))
    words = parser.parse_args()
    chosen = [word for word in words.data if not word.isdecimal()] or ["har", "writers", "digits", "heart"]
    main(chosen, next((int(word) for word in words.data if word.isdecimal()), 200), tuple(words.ways.split(",")))
