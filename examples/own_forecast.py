"""The problem of the recordings: a linear forecast of a window's last sample from those before it."""

import numpy as np
import torch
from torch import Tensor

import fedmeta


class Forecast(fedmeta.Problem):
    """One weight per earlier sample; scored by the share of the signal's variance that is explained."""

    metrics = (fedmeta.Metric("r2", higher_is_better=True),)

    def init(self, seed: int) -> dict[str, Tensor]:
        return {"weight": torch.zeros(15)}

    def inner(self, parameters: dict[str, Tensor], data: Tensor) -> Tensor:
        return (data[:, :-1] @ parameters["weight"] - data[:, -1]).square().mean()

    def evaluate(self, parameters: dict[str, Tensor], data: Tensor) -> dict[str, Tensor]:
        return {"r2": 1 - self.inner(parameters, data) / data[:, -1].var(correction=0)}


def write_recordings(folder: str, sites: int = 12, samples: int = 400) -> None:
    """Writes noisy oscillations, each site with its own frequency, as examples to run on."""
    random, times = np.random.default_rng(0), np.arange(samples)
    for site in range(sites):
        wave = np.sin(times * random.uniform(0.5, 0.9)) + 0.1 * random.normal(size=samples)
        np.save(f"{folder}/probe-{site:02d}.npy", wave)
