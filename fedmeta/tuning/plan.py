"""A search as it was asked for: what is searched, where, how, and for how long."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from fedmeta.experiment import Experiment
from fedmeta.tracking.store import SQLITE, sqlite_file
from fedmeta.tuning.samplers import interval
from fedmeta.tuning.space import Dimension, Range, Settings, rounded, usual_space, with_settings, words

STORE = "tuning.db"
"""Optuna's file: every trial of every search, beside the MLflow store."""


@dataclass(frozen=True)
class Plan:
    """A search.

    Attributes:
        experiment: What settings are searched for; its paths are absolute.
        space: What may vary, and how far.
        trials: How many settings are tried.
        sampler: One of `fedmeta.tuning.samplers.SAMPLERS`.
        pruner: One of `fedmeta.tuning.samplers.PRUNERS`.
        seed: Key of the search's own draws.
        workers: How many trials run side by side.
        runtime: Where each runs: "local" or "ray".
        parent: The MLflow run that the search is shown under; "" = none.
    """

    experiment: Experiment
    space: tuple[Dimension, ...]
    trials: int
    sampler: str = "tpe"
    pruner: str = "median"
    seed: int = 0
    workers: int = 1
    runtime: str = "local"
    parent: str = ""

    @property
    def name(self) -> str:
        """The search's name: with the same experiment, space and ways it is the same search, also with more trials."""
        said = [self.experiment.identity(), repr(self.space), self.sampler, self.pruner, self.seed]
        said += [self.trials] if self.sampler == "grid" else []
        return f"tune-{self.sampler}-{blake2b(json.dumps(said).encode(), digest_size=6).hexdigest()}"

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return Path(self.experiment.tracking.folder) / self.name

    @property
    def storage(self) -> str:
        """The address of Optuna's file."""
        mlflow = sqlite_file(self.experiment.tracking.uri)
        return f"{SQLITE}{(mlflow.parent if mlflow else Path(self.experiment.tracking.folder)) / STORE}"

    def own_settings(self) -> Settings:
        """Returns the experiment's own values of what is searched; none where one of them lies outside the space."""
        params = self.experiment.params()
        usual = {each.key: each.at(0.5) for each in usual_space(self.experiment)}
        own: Settings = {}
        for each in self.space:
            value = params.get(each.key)
            if value == "auto" and isinstance(each, Range):
                value = usual.get(each.key)
            if value is None or not each.holds(value):
                return {}
            own[each.key] = rounded(value) if isinstance(value, float) else value
        return own

    def variant(self, settings: Settings, parent: str) -> Experiment:
        """Returns the run that judges settings: on validation sites, as one of the search's.

        Args:
            settings: The values to try.
            parent: The search's MLflow run; "" = none.

        Raises:
            FedmetaError: The experiment is not possible with these values.
        """
        changed = with_settings(self.experiment, settings)
        every = interval(changed.server.rounds) if self.pruner != "none" else 0
        evaluation = changed.evaluation.model_copy(update={"judge": "validation_sites", "every": every})
        name = f"{changed.learner.name} · {words({key: settings[key] for key in settings if key != 'learner.name'})}"
        files = {"folder": str(self.folder / "trials"), "name": name, "parent": parent, "site_curves": 0}
        tracking = changed.tracking.model_copy(update=files)
        # Trials side by side would each take all processors, where the experiment does not say how many.
        threads = changed.runtime.threads or (max(1, (os.cpu_count() or 1) // self.workers) if self.workers > 1 else 0)
        runtime = changed.runtime.model_copy(update={"threads": threads})
        return changed.model_copy(update={"evaluation": evaluation, "tracking": tracking, "runtime": runtime})
