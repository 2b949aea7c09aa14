"""Runs the comparisons of the results pages: every learner tuned with one budget, the gate on, seeds as given.

    python experiments/pages.py heart har digits writers --seeds 3 --tune 5

Each page takes minutes to an hour on two cores (Omniglot longer); a run that was interrupted is resumed by the same
command.
"""

import argparse
import subprocess
import sys

from fedmeta.experiment import LEARNERS as NAMES

LEARNERS = ",".join(name for name in NAMES if name != "average")
ROUNDS = {"heart": 100, "har": 60, "digits": 100, "writers": 60, "omniglot": 500}
"""The rounds that the search starts from: validation sites choose between half and twice as many."""


def main() -> int:
    """Runs the pages that are named; returns the first exit code that is not 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="+", choices=ROUNDS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tune", type=int, default=5)
    parser.add_argument("--learners", default=LEARNERS)
    asked = parser.parse_args()
    for page in asked.pages:
        command = [sys.executable, "-m", "fedmeta", "compare", f"experiments/{page}.toml", "--learners", asked.learners]
        command += ["--seeds", str(asked.seeds), "--tune", str(asked.tune)]
        for key in (f"server.rounds={ROUNDS[page]}", "evaluation.every=0", "evaluation.gate=true"):
            command += ["--set", key]
        if code := subprocess.run(command, check=False).returncode:
            return code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
