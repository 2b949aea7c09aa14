"""A quick run on the embedded digits."""

from pathlib import Path

from fedmeta.experiment import Experiment

SETTINGS = """
[model]
hidden = "8"

[learner]
inner_steps = 2

[server]
rounds = 4
sites_per_round = 8
round_timeout = 5.0

[evaluation]
every = 2

[runtime]
engine = "vmap"
memory = 0.25
threads = 1

[tracking]
uri = "none"
"""


def digits(folder: Path, *overrides: str) -> Experiment:
    """Returns the experiment of a quick run."""
    return Experiment.from_toml(SETTINGS, overrides=[f"tracking.folder={folder / 'runs'}", *overrides])
