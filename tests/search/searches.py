"""Small real searches on the embedded digits."""

from pathlib import Path

from fedmeta.experiment import Experiment
from fedmeta.tuning.language import space_of
from fedmeta.tuning.plan import Plan
from fedmeta.tuning.results import Search
from fedmeta.tuning.searching import search

SETTINGS = [
    "server.rounds=4",
    "server.sites_per_round=8",
    "learner.inner_steps=2",
    "model.hidden=16",
    "runtime.engine=vmap",
    "runtime.memory=0.25",
    "runtime.threads=1",
]
OVER = ["learner.inner_lr=0.01:1:log", "server.lr=0.001:0.1:log"]


def described(folder: Path, *overrides: str) -> Experiment:
    return Experiment().with_overrides([*SETTINGS, f"tracking.folder={folder}", "tracking.uri=none", *overrides])


def plan(folder: Path, trials: int, sampler: str = "random", *overrides: str, over: list[str] = OVER, **how) -> Plan:
    experiment = described(folder, *overrides)
    return Plan(experiment, tuple(space_of(over, experiment)), trials, sampler, **({"pruner": "none"} | how))


def searched(asked: Plan) -> Search:
    return search(asked, lambda found: None)


def tried(found: Search) -> list[tuple]:
    return [(each.number, each.settings, each.state, each.score) for each in found.attempts]
