"""What privacy costs: epsilon against new-site accuracy on the writers' digits, for several noise multipliers.

    python experiments/private.py --noise 0.7 1 2 --rounds 60 --sites 128

Beside them: the same run without clipping, and with clipping alone. Draws and noise come from the system's entropy, so
that the figures of private runs are never the same twice.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import fedmeta

HERE = Path(__file__).parent
HEADER = (
    "| noise multiplier | epsilon | new sites, personalized | global | per seed | alone |\n|---|---|---|---|---|---|"
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.7, 1.0, 2.0])
    parser.add_argument("--clip", type=float, default=0.5, help="clip_norm")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--sites", type=int, default=128, help="expected sites in a round")
    parser.add_argument("--hidden", type=int, default=32, help="width of the model's hidden layer")
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args(arguments)
    always = [
        f"server.rounds={options.rounds}",
        f"server.sites_per_round={options.sites}",
        f"model.hidden={options.hidden}",
        "evaluation.every=0",
        "runtime.threads=1",
        "tracking.uri=none",
    ]
    clipped = f"privacy.clip_norm={options.clip}"
    runs = {"none, no clipping": [], "none": [clipped]}
    runs |= {f"{noise:g}": [clipped, f"privacy.noise_multiplier={noise}"] for noise in options.noise}
    lines = [HEADER]
    with tempfile.TemporaryDirectory(prefix="private-") as folder:
        for name, changes in runs.items():
            summaries = []
            for seed in range(options.seeds):
                own = [*always, *changes, f"runtime.seed={seed}", f"tracking.folder={folder}"]
                summaries.append(fedmeta.run(fedmeta.load_experiment(HERE / "writers.toml", own)).summary)
            new = [summary["new_sites"] for summary in summaries]
            personalized = [group["personalized"]["mean"] for group in new]
            spent = [summary["privacy"]["epsilon"] for summary in summaries if "privacy" in summary]
            epsilon = f"{np.mean(spent):.2f}" if spent else "unbounded"
            before, alone = (
                np.mean(each) for each in ([g["global"]["mean"] for g in new], [g["local_only"]["mean"] for g in new])
            )
            seeds = ", ".join(f"{score:.3f}" for score in personalized)
            lines.append(f"| {name} | {epsilon} | {np.mean(personalized):.3f} | {before:.3f} | {seeds} | {alone:.3f} |")
            print(lines[-1], file=sys.stderr, flush=True)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
