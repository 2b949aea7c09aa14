"""Anchor boxes as a learned prior of detection (Redmon and Farhadi 2017, YOLOv2).

A detector corrects a few typical boxes at each cell, the anchors. The field sets them by k-means on the training boxes,
under the distance 1 - IoU (intersection over union of shapes).

- `Boxes`: anchors alone. A site is a class of objects (PASCAL VOC), road damage in a country, or a kind of blood cell;
  it has twenty boxes. Inner problem: gradient steps on the mean IoU of a box with its anchor. Outer: where they start.
- `Scenes`: a detector. A site is a writer (QMNIST), whose digits lie in scenes in a size of the writer's own. Inner
  problem: the head, by gradient steps on four labelled scenes. Outer: anchors, features, and the head's start.

In scenes a box does not choose the best anchor alone, as in YOLOv2, but each by share s = softmax(IoU / .1), so that
the loss has a derivative by the anchors. At the cell of the box's middle

    loss = sum_a BCE(objectness_a, s_a) + s_a (|offset_a - middle|^2 + |t_a + log anchor_a - log size|^2)
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

import fedmeta
from fedmeta.errors import FedmetaError
from fedmeta.problems.problem import Parameters

SIDE, CELL, MOST, SOFT, KEPT, OVERLAP = 48, 4, 4, 0.1, 12, 0.45
"""Side of a scene and of a cell (pixels), most digits in a scene, softness of an anchor's choice, detections that are
kept of a scene, and the IoU above which the weaker of two is dropped."""

SIZES, DIGITS = "../shared/data/boxes/boxes.npz", "../shared/data/qmnist_writers/qmnist_writers.npz"


def box_iou(one: Tensor, other: Tensor) -> Tensor:
    """Returns IoU [..., n, m] of boxes [..., n, 4] and [..., m, 4], as x, y of the middle, width, height."""
    one, other = one[..., :, None, :], other[..., None, :, :]
    low = torch.maximum(one[..., :2] - one[..., 2:] / 2, other[..., :2] - other[..., 2:] / 2)
    high = torch.minimum(one[..., :2] + one[..., 2:] / 2, other[..., :2] + other[..., 2:] / 2)
    common = (high - low).clamp(min=0).prod(-1)
    return common / (one[..., 2:].prod(-1) + other[..., 2:].prod(-1) - common)


def shape_iou(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Returns IoU [boxes, anchors] of widths and heights [n, 2], middles together."""
    return box_iou(functional.pad(boxes, (2, 0)), functional.pad(anchors, (2, 0)))


def k_means(boxes: Tensor, count: int, seed: int, start: Tensor | None = None) -> Tensor:
    """Returns anchors [count, 2] by k-means under 1 - IoU; a cluster's middle is its median."""
    random = torch.Generator().manual_seed(seed)
    anchors = boxes[torch.randperm(len(boxes), generator=random)[:count]] if start is None else start
    for _ in range(100):
        nearest = shape_iou(boxes, anchors).argmax(1)
        own = [boxes[nearest == k] for k in range(len(anchors))]
        new = torch.stack([o.median(0).values if len(o) else anchors[k] for k, o in enumerate(own)])
        if torch.equal(new, anchors):
            break
        anchors = new
    return anchors


def arrays(path: str) -> dict[str, NDArray[Any]]:
    """Returns a file's arrays."""
    if not Path(path).exists():
        raise FedmetaError(f"problem.path = {path}: there is no such file (README.md has what it holds)")
    return dict(np.load(path, allow_pickle=False))


class Boxes(fedmeta.Problem, fedmeta.TaskSource):
    """Five anchors alone; the file has widths and heights `wh` as shares of the image, `site`, `site_names`."""

    metrics = (fedmeta.Metric("mean_iou", higher_is_better=True),)

    def __init__(self, path: str = SIZES) -> None:
        found = arrays(path)
        sizes, place = torch.from_numpy(found["wh"]).float().clamp(min=1e-3), torch.from_numpy(found["site"])
        own = {str(name): sizes[place == k] for k, name in enumerate(found["site_names"])}
        self.boxes = {name: own[name] for name in sorted(own) if len(own[name]) >= 140}

    def init(self, seed: int) -> Parameters:
        """Returns logarithms of random widths and heights."""
        drawn = torch.rand(5, 2, generator=torch.Generator().manual_seed(seed))
        return {"anchors": (0.05 + 0.8 * drawn).log()}

    def inner(self, parameters: Parameters, data: Any) -> Tensor:
        """Returns 1 - IoU, over a soft choice of the anchor."""
        iou = shape_iou(data["boxes"], parameters["anchors"].exp())
        return 1 - (iou * torch.softmax(iou / SOFT, -1)).sum(-1).mean()

    def evaluate(self, parameters: Parameters, data: Any) -> dict[str, Tensor]:
        """Returns the mean IoU with the best anchor."""
        return {"mean_iou": shape_iou(data["boxes"], parameters["anchors"].exp()).amax(1).mean()}

    def sites(self) -> list[str]:
        """Returns the names of kinds of objects."""
        return list(self.boxes)

    def task(self, site: str, purpose: str, round: int, seed: int) -> fedmeta.Task:
        """Returns twenty boxes and fifty others; those of the test are never trained on."""
        own, number = self.boxes[site], self.sites().index(site)
        apart = torch.randperm(len(own), generator=torch.Generator().manual_seed(number)).chunk(2)[purpose == "test"]
        chosen = torch.Generator().manual_seed(10_000 * seed + 100 * round + number)
        drawn = own[apart[torch.randperm(len(apart), generator=chosen)]]
        return fedmeta.Task({"boxes": drawn[:20]}, {"boxes": drawn[20:70].clone()})


def scene(digits: NDArray[Any], scale: float, random: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Returns an image [1, side, side] with digits in its quarters, boxes [most, 4], and a mask [most] of them."""
    image, boxes, count = torch.zeros(SIDE, SIDE), torch.ones(MOST, 4), int(random.integers(2, MOST + 1))
    for k, quarter in enumerate(random.permutation(MOST)[:count]):
        size = int(28 * scale * random.uniform(0.85, 1.15))
        small = torch.from_numpy(digits[random.integers(len(digits))]).float()[None, None] / 255
        small = functional.interpolate(small, (size, size), mode="area")[0, 0]
        ink = small > 0.25 * small.max()
        small = small[ink.any(1)][:, ink.any(0)]
        high, wide = small.shape
        y = SIDE // 2 * (quarter // 2) + int(random.integers(SIDE // 2 - high + 1))
        x = SIDE // 2 * (quarter % 2) + int(random.integers(SIDE // 2 - wide + 1))
        image[y : y + high, x : x + wide] = small
        boxes[k] = torch.tensor([x + wide / 2, y + high / 2, wide, high])
    return image[None], boxes, (torch.arange(MOST) < count).float()


@cache
def scenes(path: str, writers: int) -> dict[str, list[list[Tensor]]]:
    """Returns each writer's eight training and eight test scenes, of different digits: images, boxes, masks."""
    found = arrays(path)
    made = {}
    for writer in np.flatnonzero(np.bincount(found["site"]) >= 60)[:writers]:
        digits, random = found["x"][found["site"] == writer], np.random.default_rng(writer)
        scale = random.uniform(0.5, 1.0)
        parts = [[scene(own, scale, random) for _ in range(8)] for own in (digits[::2], digits[1::2])]
        made[f"writer-{writer:03d}"] = [[torch.stack(each) for each in zip(*part, strict=True)] for part in parts]
    return made


class Scenes(fedmeta.Problem, fedmeta.TaskSource):
    """A small detector of digits.

    Args:
        path: The digits: `x` [digits, 28, 28] and `site`, their writers.
        anchors: Widths and heights to start from (pixels), as "9x12 14x18"; three random ones where none is given.
        learned: Whether anchors are learned.
        writers: The number of sites.
    """

    metrics = (
        fedmeta.Metric("ap50", higher_is_better=True, unit="average precision at IoU .5"),
        fedmeta.Metric("recall50", higher_is_better=True, unit=f"share of digits in {KEPT} detections a scene"),
    )

    def __init__(self, path: str = DIGITS, anchors: str = "", learned: bool = True, writers: int = 72) -> None:
        self.scenes, self.anchors = (
            scenes(path, writers),
            torch.tensor([[float(n) for n in own.split("x")] for own in anchors.split()]),
        )
        body = tuple(f"conv{k}.{kind}" for k in (1, 2, 3) for kind in ("weight", "bias"))
        self.shared, self.frozen = ((*body, "anchors"), ()) if learned else (body, ("anchors",))

    def init(self, seed: int) -> Parameters:
        """Returns random features off ReLU's kink where a scene is black, a head that sees nothing, log anchors."""
        random = torch.Generator().manual_seed(seed)
        drawn, found = 6 + 18 * torch.rand(3, 2, generator=random), Parameters()
        sizes = self.anchors if len(self.anchors) else drawn
        for k, (inside, out) in enumerate(((1, 12), (12, 16), (16, 16)), 1):
            weight = torch.randn(out, inside, 3, 3, generator=random)
            found |= {f"conv{k}.weight": weight * (2 / (9 * inside)) ** 0.5, f"conv{k}.bias": torch.full((out,), 0.1)}
        bias = torch.tensor([-3.0, 0, 0, 0, 0]).repeat(len(sizes), 1)
        weight = 0.05 * torch.randn(5 * len(sizes), 16, 1, 1, generator=random)
        return {**found, "anchors": sizes.log(), "head.weight": weight, "head.bias": bias.reshape(-1)}

    def predicted(self, p: Parameters, images: Tensor) -> Tensor:
        """Returns objectness, offset x, y in the cell, log width, log height [scenes, anchors, 5, cells, cells]."""
        x = images
        for k, stride in ((1, 2), (2, 2), (3, 1)):
            x = functional.relu(functional.conv2d(x, p[f"conv{k}.weight"], p[f"conv{k}.bias"], stride, 1))
        x = functional.conv2d(x, p["head.weight"], p["head.bias"]).unflatten(1, (-1, 5))
        sizes = x[:, :, 3:] + p["anchors"][None, :, :, None, None]
        return torch.cat([x[:, :, :1], x[:, :, 1:3].sigmoid(), sizes], 2)

    def inner(self, parameters: Parameters, data: Any) -> Tensor:
        """Returns the loss per digit."""
        found, boxes, mask = self.predicted(parameters, data["images"]), data["boxes"], data["mask"]
        middle, size = boxes[..., :2] / CELL, boxes[..., 2:]
        column, row = (middle[..., k].long().clamp(0, SIDE // CELL - 1) for k in (0, 1))
        iou = shape_iou(size.flatten(0, 1), parameters["anchors"].exp()).unflatten(0, size.shape[:2])
        share = torch.softmax(iou / SOFT, -1) * mask[..., None]
        number = torch.arange(len(boxes))[:, None].expand_as(column)
        own = found[number, :, :, row, column]
        wanted = torch.cat([middle - middle.floor(), size.log()], -1)[:, :, None]
        off = (share * (own[..., 1:] - wanted).square().sum(-1)).sum()
        # BCE(objectness, share) = softplus(objectness) - share * objectness; elsewhere the share is 0.
        sure = functional.softplus(found[:, :, 0]).sum() - (share * own[..., 0]).sum()
        return (off + sure) / mask.sum()

    def detected(self, parameters: Parameters, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the strongest detections of each scene: boxes [scenes, kept, 4] and objectness [scenes, kept]."""
        found = self.predicted(parameters, images)
        cells = torch.arange(SIDE // CELL)
        corner = torch.stack(torch.meshgrid(cells, cells, indexing="xy")).to(found)
        boxes = torch.cat([(found[:, :, 1:3] + corner) * CELL, found[:, :, 3:].clamp(max=5).exp()], 2)
        boxes, score = boxes.movedim(2, -1).flatten(1, 3), found[:, :, 0].flatten(1)
        kept = []
        for _ in range(KEPT):
            best, place = score.max(1, keepdim=True)
            own = boxes.gather(1, place[..., None].expand(-1, -1, 4))
            score = score.masked_fill(box_iou(own, boxes)[:, 0] > OVERLAP, -1e4).scatter(1, place, -1e4)
            kept.append((own, best))
        return torch.cat([own for own, _ in kept], 1), torch.cat([best for _, best in kept], 1)

    def evaluate(self, parameters: Parameters, data: Any) -> dict[str, Tensor]:
        """Returns average precision (mean over digits of the precision where each is found) and recall, at IoU .5."""
        boxes, score = self.detected(parameters, data["images"])
        iou, free = box_iou(boxes, data["boxes"]) * data["mask"][:, None], data["mask"].clone()
        hits = []
        for k in range(KEPT):
            best, place = (iou[:, k] * free).max(1, keepdim=True)
            hits.append((best >= 0.5).float())
            free = free - torch.zeros_like(free).scatter(1, place, hits[-1])
        hit = torch.cat(hits, 1).flatten()[score.flatten().argsort(descending=True)]
        precision, digits = hit.cumsum(0) / torch.arange(1, len(hit) + 1), data["mask"].sum()
        return {"ap50": (precision * hit).sum() / digits, "recall50": hit.sum() / digits}

    def picture(self, parameters: Parameters, data: Any) -> NDArray[np.float64]:
        """Returns two scenes with what is detected (objectness above .5)."""
        boxes, score = self.detected(parameters, data["images"][:2])
        image = np.kron(data["images"][:2, 0].numpy(), np.ones((1, 4, 4)))[..., None].repeat(3, -1)
        for own, found, sure in zip(image, boxes, score, strict=True):
            for x, y, wide, high in found[sure > 0].tolist():
                low, top = (int(max(4 * value, 0)) for value in (x - wide / 2, y - high / 2))
                frame = own[top : int(4 * (y + high / 2)) + 1, low : int(4 * (x + wide / 2)) + 1]
                frame[[0, -1]] = frame[:, [0, -1]] = (1.0, 0.5, 0.0)
        return np.hstack(list(image))

    def sites(self) -> list[str]:
        """Returns the writers' names."""
        return sorted(self.scenes)

    def task(self, site: str, purpose: str, round: int, seed: int) -> fedmeta.Task:
        """Returns four labelled scenes and others: of other digits in the test."""
        training, test = (dict(zip(("images", "boxes", "mask"), part, strict=True)) for part in self.scenes[site])
        chosen = torch.randperm(8, generator=torch.Generator().manual_seed(1000 * seed + round))
        query = test if purpose == "test" else {name: value[chosen[4:]] for name, value in training.items()}
        return fedmeta.Task({name: value[chosen[:4]] for name, value in training.items()}, query)
