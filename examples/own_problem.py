"""A problem of one's own: every body aberrates an ultrasound array in its own way; K steps on a few echoes focus it."""

import torch
from torch import Tensor

import fedmeta


class Array(fedmeta.Problem, fedmeta.TaskSource):
    """Phases that make echoes coherent; scored in dB of coherence, which is negative."""

    metrics = (fedmeta.Metric("coherence", higher_is_better=True, unit="dB"),)

    def __init__(self, elements: int = 16, bodies: int = 12, echoes: int = 4) -> None:
        random = torch.Generator().manual_seed(0)
        common = (0.6 * torch.randn(elements, generator=random)).cumsum(-1)
        self.aberration = common + (0.15 * torch.randn(bodies, elements, generator=random)).cumsum(-1)
        self.echoes = echoes

    def init(self, seed: int) -> dict[str, Tensor]:
        return {"phase": torch.zeros(self.aberration.shape[1])}

    def inner(self, parameters: dict[str, Tensor], data: dict[str, Tensor]) -> Tensor:
        phases = parameters["phase"] + data["phases"]
        return 1 - (phases.cos().mean(-1).square() + phases.sin().mean(-1).square()).mean()

    def evaluate(self, parameters: dict[str, Tensor], data: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"coherence": 10 * torch.log10(1 - self.inner(parameters, data))}

    def sites(self) -> list[str]:
        return [f"body-{number:02d}" for number in range(len(self.aberration))]

    def task(self, site: str, purpose: str, round: int, seed: int) -> fedmeta.Task:
        body = int(site[-2:])
        random = torch.Generator().manual_seed(1000 * round + 2 * body + (purpose == "train"))
        echoes = self.aberration[body] + 0.3 * torch.randn(2 * self.echoes, self.aberration.shape[1], generator=random)
        return fedmeta.Task({"phases": echoes[: self.echoes]}, {"phases": echoes[self.echoes :]})
