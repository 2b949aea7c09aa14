"""Adaptive beamforming: every body delays an ultrasound array's echoes in its own way (Flax and O'Donnell 1988).

An array of 96 elements hears speckle around a focus 40 mm deep. Tissue between adds a delay tau_i to the way to and
from element i, so that echoes no longer arrive together. A body's data are full-matrix captures (every element sends,
all listen), delayed for a homogeneous body, at five frequencies:

    K_f[i, j] = sum_m a_m exp(-ik (r_im - r_i0)) exp(-ik (r_jm - r_j0)) exp(2 pi i f (tau_i + tau_j)) + noise

with scatterers m of strength a_m at distance r_im, and r_i0 the distance to the focus. With delays c taken off on both
ways, element i's signal is s_i = w_i sum_j K_f[i, j] w_j, w = exp(-2 pi i f c). Its coherence factor (Mallart and Fink
1994) is |sum_i s_i|^2 / (N sum_i |s_i|^2): 2/3 for speckle in perfect focus, without noise.

Inner problem: K gradient steps on coherence at three foci, over 32 smooth modes of delay. Outer problem: the modes that
all bodies start from. A site is a body. Two kinds of tissue:

- "chest": random screens of mean 0, rms 21.3 +- 8.4 ns, correlation length 2.5 mm (chest wall: Hinkelman et al. 1997).
- "fat": the same screens behind 30 +- 8 mm of fat, in which sound is slower (1 450 against 1 540 m/s).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fedmeta
from fedmeta.errors import FedmetaError
from fedmeta.problems.problem import Parameters

ELEMENTS, PITCH, DEPTH, SOUND, SOUND_IN_FAT = 96, 0.4e-3, 40e-3, 1540.0, 1450.0
"""Count, distance (m), depth of focus (m), speed of sound in tissue and in fat (m/s)."""

FREQUENCIES = torch.linspace(2.5e6, 4.5e6, 5)
PLACES = (torch.arange(ELEMENTS) - (ELEMENTS - 1) / 2) * PITCH
UNIT = 1e-8
"""Seconds (rms) per unit of a mode."""

SCATTERERS = 60
FOCI, APART = 14, 0.6e-3


def cosines(count: int) -> Tensor:
    """Returns modes [elements, count] of rms 1, without the constant one, which changes nothing."""
    angle = math.pi * (torch.arange(ELEMENTS, dtype=torch.float64) + 0.5) / ELEMENTS
    return (torch.stack([torch.cos(k * angle) for k in range(1, count + 1)], 1) * math.sqrt(2)).float()


MODES = cosines(32)


def screen(random: torch.Generator, rms: float, length: float = 2.5e-3) -> Tensor:
    """Returns random delays [elements] (s) of mean 0 with a Gaussian correlation of this length (m)."""
    distance = (PLACES[:, None] - PLACES).double()
    covariance = torch.exp(-((distance / length) ** 2)) + 1e-6 * torch.eye(ELEMENTS, dtype=torch.float64)
    drawn = torch.linalg.cholesky(covariance) @ torch.randn(ELEMENTS, generator=random, dtype=torch.float64)
    return (rms * (drawn - drawn.mean())).float()


def fat(thickness: float) -> Tensor:
    """Returns the delays [elements] (s) of a layer of fat (m): outer elements look through more of it."""
    delays = thickness * (1 + (PLACES / DEPTH) ** 2).sqrt() * (1 / SOUND_IN_FAT - 1 / SOUND)
    return delays - delays.mean()


def capture(delays: Tensor, foci: int, random: torch.Generator, snr: float) -> Tensor:
    """Returns captures [foci, frequencies, elements, elements] of speckle around foci side by side.

    Args:
        delays: What the tissue adds to the way of each element [elements] (s).
        foci: How many, each with its own speckle.
        random: Draws scatterers and noise.
        snr: Signal over noise in a single channel (dB); infinite for none.
    """
    wave = 2 * math.pi * FREQUENCIES[:, None, None] / SOUND
    shift = torch.exp(2j * math.pi * FREQUENCIES[:, None] * delays)
    found = []
    for number in range(foci):
        focus = (number - (foci - 1) / 2) * APART
        x = focus + (torch.rand(SCATTERERS, generator=random) - 0.5) * 4e-3
        z = DEPTH + (torch.rand(SCATTERERS, generator=random) - 0.5) * 1e-3
        strength = torch.randn(SCATTERERS, generator=random).to(torch.complex64)
        way = torch.hypot(PLACES[:, None] - x, z.expand(ELEMENTS, -1)) - torch.hypot(
            PLACES - focus, torch.tensor(DEPTH)
        ).unsqueeze(1)
        phase = torch.exp(-1j * wave * way) * shift[:, :, None]
        echoes = (phase * strength) @ phase.mT
        noise = torch.randn(*echoes.shape, 2, generator=random) / math.sqrt(2)
        level = echoes.abs().square().mean().sqrt() * 10 ** (-snr / 20)
        found.append(echoes + level * torch.view_as_complex(noise))
    return torch.stack(found)


def coherence(echoes: Tensor, delays: Tensor) -> Tensor:
    """Returns the coherence factor of captures [foci, frequencies, elements, elements] with delays taken off (s)."""
    angle = -2 * math.pi * FREQUENCIES[:, None].to(delays.dtype) * delays
    weight = torch.complex(angle.cos(), angle.sin())
    signal = (echoes @ weight[None, :, :, None]).squeeze(-1) * weight
    power = signal.abs().square().sum(-1).mean(-1).sum()
    return signal.sum(-1).abs().square().mean(-1).sum() / (ELEMENTS * power)


class Ultrasound(fedmeta.Problem, fedmeta.TaskSource):
    """An array in front of bodies.

    Args:
        tissue: "fat" (a part that all share) or "chest" (none).
        bodies: The number of sites.
        snr: Signal over noise in a single channel (dB).
    """

    metrics = (
        fedmeta.Metric("coherence", higher_is_better=True),
        fedmeta.Metric("of_true_delays", higher_is_better=True, unit="share of the coherence with true delays"),
        fedmeta.Metric("residual", higher_is_better=False, unit="ns rms, without shift and tilt"),
    )

    def __init__(self, tissue: str = "fat", bodies: int = 50, snr: float = -10.0) -> None:
        if tissue not in ("fat", "chest"):
            raise FedmetaError(f'problem.tissue = "{tissue}": it is "fat" or "chest"')
        self.tissue, self.bodies, self.snr = tissue, bodies, snr
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    def init(self, seed: int) -> Parameters:
        """Returns no correction."""
        return {"modes": torch.zeros(MODES.shape[1])}

    def delays(self, parameters: Parameters) -> Tensor:
        """Returns the delays [elements] (s) that are taken off."""
        return UNIT * (MODES.to(parameters["modes"].dtype) @ parameters["modes"])

    def inner(self, parameters: Parameters, data: Any) -> Tensor:
        """Returns 1 - coherence."""
        return 1 - coherence(data["echoes"], self.delays(parameters))

    def outer(self, parameters: Parameters, data: Any) -> Tensor:
        """Returns -log coherence, in which bodies of little coherence count as much as others."""
        return -coherence(data["echoes"], self.delays(parameters)).log()

    def evaluate(self, parameters: Parameters, data: Any) -> dict[str, Tensor]:
        """Returns coherence, its share of what true delays give, and the delays' error."""
        taken, true = self.delays(parameters), data["delays"]
        tilt = torch.stack([torch.ones(ELEMENTS), PLACES * 1e3], 1).to(taken.dtype)
        left = (true - taken) * 1e9
        left = left - tilt @ (torch.linalg.inv(tilt.mT @ tilt) @ (tilt.mT @ left))
        found = coherence(data["echoes"], taken)
        share = found / coherence(data["echoes"], true)
        return {"coherence": found, "of_true_delays": share, "residual": left.square().mean().sqrt()}

    def picture(self, parameters: Parameters, data: Any) -> NDArray[np.float64]:
        """Returns an image of three point targets through the body, 8 mm by 6 mm, from -40 dB (0) to 0 dB (1)."""
        delays = data["delays"] - self.delays(parameters)
        x, z = torch.linspace(-4e-3, 4e-3, 96), torch.linspace(-3e-3, 3e-3, 72) + DEPTH
        seen = torch.hypot(PLACES[:, None, None] - x, z[:, None].expand(ELEMENTS, -1, len(x)))
        targets = torch.tensor([-2.5e-3, 0.0, 2.5e-3])
        own = torch.hypot(PLACES - targets[:, None], torch.tensor(DEPTH))
        total = torch.zeros(len(z), len(x), dtype=torch.complex64)
        frequencies = torch.linspace(float(FREQUENCIES[0]), float(FREQUENCIES[-1]), 33)  # five would repeat each 1.5 mm
        for f in frequencies:
            wave = 2 * math.pi * f / SOUND
            arrived = torch.exp(1j * (2 * math.pi * f * delays - wave * own))
            heard = torch.einsum("ti,izx->tzx", arrived, torch.exp(1j * wave * seen))
            total += heard.square().sum(0)
        level = 20 * torch.log10(total.abs() / (len(frequencies) * ELEMENTS**2) + 1e-6)
        image: NDArray[np.float64] = (level / 40 + 1).clamp(0, 1).numpy().astype(float)
        return image

    def body(self, number: int) -> tuple[Tensor, Tensor]:
        """Returns a body's captures and its true delays."""
        if number not in self._known:
            random = torch.Generator().manual_seed(number)
            drawn = torch.randn(2, generator=random)
            delays = screen(random, float(21.3e-9 + 8.4e-9 * drawn[0].clamp(-2, 2)))
            if self.tissue == "fat":
                delays = delays + fat(float((30e-3 + 8e-3 * drawn[1]).clamp(8e-3, 39e-3)))
            self._known[number] = (capture(delays, FOCI, random, self.snr), delays)
        return self._known[number]

    def sites(self) -> list[str]:
        """Returns the bodies' names."""
        return [f"body-{number:02d}" for number in range(self.bodies)]

    def task(self, site: str, purpose: str, round: int, seed: int) -> fedmeta.Task:
        """Returns three foci to adapt on and four between and beside them; the test has every other one of all foci."""
        echoes, delays = self.body(int(site.rpartition("-")[2]))
        own = list(range(0, FOCI, 2)) if purpose == "test" else list(range(1, FOCI, 2))
        turn = 0 if purpose == "test" else round % len(own)
        own = own[turn:] + own[:turn]
        return fedmeta.Task(*({"echoes": echoes[part], "delays": delays} for part in (own[1::2], own[::2])))
