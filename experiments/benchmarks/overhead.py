"""What a round costs outside the learner: messages, sampling, episodes, gathering, aggregation, the server's step.

    python experiments/benchmarks/overhead.py [--rounds 100] [--profile]

Runs experiments/digits.toml in the local runtime without evaluations, times every call of the cohort engine, and
reports what is left of each round.
"""

import argparse
import cProfile
import itertools
import json
import pstats
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import fedmeta
from fedmeta import engines

EXPERIMENT = Path(__file__).parents[1] / "digits.toml"


def measure(rounds: int, folder: str) -> dict[str, Any]:
    """Returns medians over rounds, in milliseconds: the whole round, the learner's part, and the rest."""
    inside: list[float] = []
    original = engines.meta_gradients

    def timed(*arguments: Any, **keywords: Any) -> Any:
        started = time.perf_counter()
        result = original(*arguments, **keywords)
        inside.append(time.perf_counter() - started)
        return result

    overrides = [f"server.rounds={rounds}", "evaluation.every=0", "tracking.uri=none", f"tracking.folder={folder}"]
    experiment = fedmeta.load_experiment(EXPERIMENT, overrides)
    ends: list[float] = []
    engines.meta_gradients = timed
    try:
        result = fedmeta.run(experiment, report=lambda progress: ends.append(time.perf_counter()))
    finally:
        engines.meta_gradients = original
    # One report before the first round, one after each, one after the evaluation at the end.
    whole = [after - before for before, after in itertools.pairwise(ends[: rounds + 1])]
    rest = [total - learner for total, learner in zip(whole, inside[-rounds:], strict=True)]
    figures = {"round_ms": whole, "learner_ms": inside[-rounds:], "outside_ms": rest}
    medians = {name: 1e3 * statistics.median(values) for name, values in figures.items()}
    return {
        "rounds": rounds,
        "sites_per_round": experiment.server.sites_per_round,
        **medians,
        "wall_s": result.summary["wall_s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--profile", action="store_true", help="also print where the time goes")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(5, folder)
        profile = cProfile.Profile()
        if options.profile:
            profile.enable()
        figures = measure(options.rounds, folder)
        profile.disable()
    print("| rounds | sites a round | round | in the learner | outside it |")
    print("|---|---|---|---|---|")
    times = (f"{figures[name]:.2f} ms" for name in ("round_ms", "learner_ms", "outside_ms"))
    print(f"| {figures['rounds']} | {figures['sites_per_round']} | " + " | ".join(times) + " |")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    if options.profile:
        pstats.Stats(profile).sort_stats("cumulative").print_stats(40)


if __name__ == "__main__":
    main()
