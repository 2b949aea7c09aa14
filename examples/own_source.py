"""A task source of one's own: folders of recordings, one per site, of which every task takes its own windows."""

from pathlib import Path

import numpy as np
import torch

import fedmeta


class Recordings(fedmeta.TaskSource):
    """Sites are files NAME.npy with a signal [samples]; the last fifth of each is for tests alone."""

    def __init__(self, folder: str, window: int = 16, windows: int = 8, path: str = "", site: str = "") -> None:
        files = [Path(path)] if path else sorted(Path(folder).glob("*.npy"))
        self.signals = {site or file.stem: torch.from_numpy(np.load(file)).float() for file in files}
        self.window, self.windows = window, windows

    def sites(self) -> list[str]:
        return sorted(self.signals)

    def weight(self, site: str) -> float:
        return float(len(self.signals[site]))

    def task(self, site: str, purpose: str, round: int, seed: int) -> fedmeta.Task:
        signal = self.signals[site]
        cut = 4 * len(signal) // 5
        train, test = signal[:cut].unfold(0, self.window, 1), signal[cut:].unfold(0, self.window, 1)
        # One generator for each site, purpose, round and seed: the same task wherever it is asked for.
        random = np.random.default_rng([seed, round, *purpose.encode(), *site.encode()])
        drawn = torch.from_numpy(random.permutation(len(train))[: 2 * self.windows])
        support, query = train[drawn[: self.windows]], train[drawn[self.windows :]]
        return fedmeta.Task(support, test if purpose == "test" else query)
