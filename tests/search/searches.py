"""Small real searches on the embedded digits."""

from pathlib import Path

from fedmeta.experiment import Experiment
from fedmeta.search.optimize import tune
from fedmeta.search.results import StudyResult
from fedmeta.search.space import parse
from fedmeta.search.study import SearchConfig

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


def config(
    folder: Path, trials: int, sampler: str = "random", *overrides: str, over: list[str] = OVER, **how
) -> SearchConfig:
    experiment = described(folder, *overrides)
    return SearchConfig(experiment, parse(over, experiment), trials, sampler, **({"pruner": "none"} | how))


def searched(asked: SearchConfig) -> StudyResult:
    return tune(asked, lambda result: None)


def tried(result: StudyResult) -> list[tuple]:
    return [(each.number, each.settings, each.state, each.score) for each in result.trials]
