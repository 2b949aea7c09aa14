"""SimpleILT by the contest's own kernels: a published row that the imaging here is held against (OpenILT, Zheng 2023).

The contest's lens is a sum of coherent kernels h_k of weight w_k, one set in focus and one out of focus:

    I = sum_k w_k |h_k * (dose M)|^2,   print = 1 / (1 + exp(-50 (I - .225)))

on 2 048 x 2 048 pixels of 1 nm. Mask M = 1 / (1 + exp(-4 P)) is free in the middle 1 024 nm; P begins at 2 target - 1
and takes twenty steps of .5 along the gradient of the squared errors of the nominal, the strongest and the weakest
print (doses 1, 1.02, and .98 out of focus). The best of them, made binary, is scored.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.gallery.lithography.lithography import STEEPNESS, THRESHOLD, read_clip

SIDE, COARSE, FREE = 2048, 128, slice(512, 1536)
"""Pixels of 1 nm, pixels on which fields are made (their bandwidth is 69 of 2 048), and where the mask is free."""

STEPS, RATE, SLOPE, DOSES = 20, 0.5, 4.0, (1.0, 1.02, 0.98)


def resized(spectrum: Tensor, side: int) -> Tensor:
    """Returns a centered spectrum [..., n, n] with zeros around it, or cut, to `side`."""
    n = spectrum.shape[-1]
    low = side // 2 - n // 2
    if low < 0:
        return spectrum[..., -low : side - low, -low : side - low]
    return torch.nn.functional.pad(spectrum, (low, side - n - low) * 2)


class Contest:
    """The contest's imaging.

    Args:
        folder: Where its clips and `kernels.npz` are.
    """

    def __init__(self, folder: Path) -> None:
        found = np.load(folder / "kernels.npz", allow_pickle=False)
        self.lenses = [
            (torch.from_numpy(found[f"kernels_{name}"]).permute(2, 0, 1), torch.from_numpy(found[f"scales_{name}"]))
            for name in ("focus", "defocus")
        ]

    def images(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the intensity [side, side] in focus and out of focus, dose 1.

        An intensity has no frequency beyond twice the kernels'. It is made on a coarse grid and interpolated, exactly.
        """
        side = self.lenses[0][0].shape[-1]
        spectrum = resized(torch.fft.fftshift(torch.fft.fft2(mask, norm="forward")), side + 1)[..., 1:, 1:]
        found = []
        for kernels, weights in self.lenses:
            fields = torch.fft.ifft2(torch.fft.ifftshift(resized(kernels * spectrum, COARSE), (-2, -1)), norm="forward")
            coarse = (weights[:, None, None] * fields.abs().square()).sum(0)
            fine = resized(torch.fft.fftshift(torch.fft.fft2(coarse, norm="forward")), SIDE)
            found.append(torch.fft.ifft2(torch.fft.ifftshift(fine), norm="forward").real)
        return found[0], found[1]

    def corners(self, mask: Tensor) -> list[Tensor]:
        """Returns the intensity of the nominal, the strongest and the weakest print; dose scales the mask."""
        focused, blurred = self.images(mask)
        return [dose**2 * image for dose, image in zip(DOSES, (focused, focused, blurred), strict=True)]

    def scores(self, mask: Tensor, target: Tensor) -> tuple[float, float]:
        """Returns L2 and the process band (nm^2) of a binary mask."""
        nominal, most, least = (image >= THRESHOLD for image in self.corners(mask))
        return float((nominal != (target > 0.5)).sum()), float((most != least).sum())

    def simple_ilt(self, target: Tensor, steps: int = STEPS) -> Tensor:
        """Returns the binary mask that so many steps find."""
        start = 2 * target - 1
        own, best, lowest = start.clone(), start, float("inf")
        for _ in range(steps + 1):
            own.requires_grad_()
            mask = (SLOPE * start).sigmoid()
            mask[FREE, FREE] = (SLOPE * own[FREE, FREE]).sigmoid()
            prints = [(STEEPNESS * (image - THRESHOLD)).sigmoid() for image in self.corners(mask)]
            loss = torch.stack([(each - target).square().sum() for each in prints]).sum()
            if float(loss.detach()) < lowest:
                best, lowest = mask.detach(), float(loss.detach())
            (slope,) = torch.autograd.grad(loss, own)
            own = (own - RATE * slope).detach()
        return (best > 0.5).float()


def target(folder: Path, number: int) -> Tensor:
    """Returns a clip's pattern [side, side], 1 nm a pixel."""
    return torch.nn.functional.pad(read_clip(folder / f"M1_test{number}.glp", 1), (512,) * 4)


def published(folder: Path) -> tuple[tuple[float, float], tuple[float, float]]:
    """Returns L2 and process band of the first clip before and after SimpleILT."""
    contest, wanted = Contest(folder), target(folder, 1)
    return contest.scores(wanted, wanted), contest.scores(contest.simple_ilt(wanted), wanted)
