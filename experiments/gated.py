"""What the gate does to new sites: their score and the share helped or unchanged, without and with it.

    python experiments/gated.py FOLDER...

Each folder holds the sites.parquet of a comparison that ran with `evaluation.gate = true`; every site is then scored
both ways, by the same model on the same rows. Prints a Markdown table with one row per learner, and one for all.
"""

import argparse
from pathlib import Path

import pandas as pd


def gated(sites: pd.DataFrame) -> pd.DataFrame:
    """Returns the mean score and the share helped over new sites, ungated and gated, per learner and of all."""
    new = sites[(sites["kind"] == "new") & sites["ungated_accuracy"].notna()]
    new = new.groupby("learner").filter(lambda own: (own["steps"].map(len) > 1).any())  # the others do not adapt
    rows = []
    for learner, own in [*new.groupby("learner", sort=True), ("all", new)]:
        before, after, free = (own[f"{name}_accuracy"] for name in ("global", "personalized", "ungated"))
        rows.append((learner, len(own), free.mean(), after.mean(), (free >= before).mean(), (after >= before).mean()))
    return pd.DataFrame(rows, columns=["learner", "sites", "free", "gated", "helped_free", "helped_gated"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    for folder in parser.parse_args().folders:
        print(f"\n{folder.name}\n\n| learner | sites x seeds | ungated | gated | change | helped, ungated | gated |")
        print("|" + "---|" * 7)
        for row in gated(pd.read_parquet(folder / "sites.parquet")).itertuples():
            change = f"{100 * (row.gated - row.free):+.1f} points"
            helped = f"{row.helped_free:.0%} | {row.helped_gated:.0%}"
            print(f"| {row.learner} | {row.sites} | {row.free:.3f} | {row.gated:.3f} | {change} | {helped} |")


if __name__ == "__main__":
    main()
