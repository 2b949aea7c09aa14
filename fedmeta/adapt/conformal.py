"""Prediction sets at a site: by its own rows, with a coverage that holds for any number of them and any model.

Min-max cross-conformal prediction (Barber, Candes, Ramdas, Tibshirani, "Predictive inference with the jackknife+",
Annals of Statistics 49:486, 2021, section 3, there by leaving one row out): the rows are dealt to K folds of b rows;
model k adapts to all rows but fold k, and scores each row of it, R = 1 - p(label), or |y - prediction| of a number. A
class is in the set of a further row where its smallest score over the K models is at most the r-th smallest R, with
r = ceil((1 - alpha)(K b + b)).

Why it covers: imagine b further rows as fold K + 1, and let m be a row's smallest score over the models that leave its
own fold and one more out. m is exchangeable over the (K + 1) b rows; a further row is missed only if its m is above
those of r rows, so that at most (K + 1) b - r of them are, each as likely as the other: alpha at most. The folds must
be equal and drawn without a look at labels; rows that are left over (n - K b) adapt in every model. r is at most K b
from nine folds on; with fewer rows every class is in the set.

What the federation gives shapes the score alone: the start and how far the run adapted, and not at all where adapting
did not help its training sites. Then all K models are the start's, every row calibrates, and it is split-conformal
prediction without a split. The threshold comes from the site's rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor
from torch.func import functional_call

from fedmeta.adapt.initialization import MetaModel
from fedmeta.adapt.model import SiteModel
from fedmeta.errors import FedmetaError
from fedmeta.files import read_json, read_tensors, write_atomic
from fedmeta.randomness import row_draws, site_keys
from fedmeta.signing import check_signature, signed

FILE = "sets.safetensors"
FORMAT = "fedmeta-sets-1"

ALPHA = 0.1
"""The largest share of further rows whose class is not in its set."""

MOST_FOLDS = 40
"""Into how many folds rows are dealt at most: of up to so many rows each is left out alone."""

MOST_VALUES = 1 << 24
"""How many parameters all folds' models together may have before there are fewer folds: 64 MB."""

FEWEST_FOLDS = 9
"""With fewer folds, or rows, no score is large enough for 90 %, and every class is in the set."""


@dataclass(frozen=True)
class Facts:
    """What is known of prediction sets.

    Attributes:
        rows: The site's rows.
        folds: Into how many folds they were dealt; 1 where the score needs none, for no model adapted to them.
        left_out: The rows of one fold.
        steps: The inner steps of each fold's model.
        rank: The rank of the score that is the threshold.
        threshold: The largest score of what is in a set; None = everything is.
        exchangeable: Whether further rows are drawn as the site's are; not where neighbors resemble each other.
        alpha: The share of further rows that may be missed.
    """

    rows: int
    folds: int
    left_out: int
    steps: int
    rank: int
    threshold: float | None
    exchangeable: bool
    alpha: float = ALPHA

    @property
    def guarantee(self) -> str:
        """One sentence: what holds of the sets, and under which condition."""
        share = f"{1 - self.alpha:.0%}"
        if self.threshold is None:
            return (
                f"Prediction sets: {self.rows} rows are too few for {share} coverage ({FEWEST_FOLDS} are needed), so "
                "that everything is in each set."
            )
        way = (
            "split-conformal by all rows, for the score adapts to none of them"
            if self.folds == 1
            else f"min-max cross-conformal, {self.folds} models, each without {self.left_out}"
        )
        if not self.exchangeable:
            return (
                f"Prediction sets without a guarantee ({way}): neighboring rows resemble each other "
                "(data.split = blocks or time), and later rows may be unlike these."
            )
        scored = self.rows if self.folds == 1 else self.folds * self.left_out
        return (
            f"Prediction sets hold the truth for at least {share} of further rows ({way}; rank {self.rank} of {scored} "
            "scores), on average over sites and draws of rows, if further rows are drawn as these are."
        )


@dataclass(frozen=True)
class Sets:
    """Prediction sets of a site: the folds' models and the threshold.

    Attributes:
        model: The site's model, whose most likely class is in every set.
        folds: The parameters of the folds' models [folds, *shape].
        facts: What is known of them.
    """

    model: SiteModel
    folds: Mapping[str, Tensor]
    facts: Facts

    def classes(self, x: Tensor) -> NDArray[np.bool_]:
        """Returns which classes are in the set of each raw row [n, classes]."""
        with torch.no_grad():
            probable = self.model(x).argmax(-1).numpy()
            scores = np.stack([1 - outputs for outputs in self._outputs(x)]).min(axis=0)
        limit = math.inf if self.facts.threshold is None else self.facts.threshold
        inside: NDArray[np.bool_] = np.nan_to_num(scores, nan=math.inf) <= limit
        inside[np.arange(len(x)), probable] = True
        return inside

    def interval(self, x: Tensor) -> NDArray[np.float64]:
        """Returns the interval of each raw row's number [n, 2]; infinite ends where rows are too few."""
        found = np.stack(list(self._outputs(x)))
        limit = math.inf if self.facts.threshold is None else self.facts.threshold
        if self.model.log:
            found = np.log(found)
        ends = np.stack([found.min(axis=0) - limit, found.max(axis=0) + limit], axis=1)
        return np.exp(ends) if self.model.log else ends

    def covered(self, x: Tensor, y: Tensor) -> tuple[float, float]:
        """Returns the share of labelled rows whose set holds the truth, and the sets' mean size (or width)."""
        if self.model.form.regression:
            low, high = self.interval(x).T
            own = y.double().numpy()
            return float(((low <= own) & (own <= high)).mean()), float((high - low).mean())
        inside = self.classes(x)
        return float(inside[np.arange(len(x)), y.numpy()].mean()), float(inside.sum(axis=1).mean())

    def _outputs(self, x: Tensor) -> list[NDArray[np.float64]]:
        """Returns what each fold's model gives for raw rows."""
        count = len(next(iter(self.folds.values())))
        return [
            _output(self.model, {name: value[fold] for name, value in self.folds.items()}, x) for fold in range(count)
        ]

    def write(self, path: Path) -> None:
        """Writes them into one file, atomically; the file is of this model alone."""
        texts = {"format": FORMAT, "facts": json.dumps(asdict(self.facts)), "model": digest(self.model)}
        tensors = {name: value.contiguous() for name, value in self.folds.items()}
        write_atomic(path, save(tensors, signed(texts, tensors)))

    @classmethod
    def read(cls, path: Path, model: SiteModel) -> Sets:
        """Reads what `write` wrote for a model.

        Raises:
            FedmetaError: It is not such a file, is of another model, or lacks the signature that is asked for.
        """
        texts, tensors = read_tensors(path, "file of prediction sets", FORMAT)
        check_signature(str(path), texts, tensors)
        facts = read_json(texts.get("facts", ""), Facts, f"{path}: not what is known of prediction sets")
        wanted = {name: value.shape for name, value in model.network.named_parameters()}
        if texts.get("model") != digest(model) or {name: each.shape[1:] for name, each in tensors.items()} != wanted:
            raise FedmetaError(f"{path} was made for another model: adapt again, or remove it")
        return cls(model, tensors, facts)


def digest(model: SiteModel) -> str:
    """Returns a hash of a model's state, 32 characters."""
    content = blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content.update(tensor.detach().contiguous().numpy().tobytes())
    return content.hexdigest()


def make_sets(start: MetaModel, model: SiteModel, x: Tensor, y: Tensor) -> Sets | None:
    """Returns the prediction sets that a site's labelled rows give; None where several numbers are predicted.

    Args:
        start: What the run leaves.
        model: The site's model.
        x: Raw rows [n, *shape].
        y: Codes of classes [n], or numbers in their own units [n].
    """
    if start.form.regression and start.form.outputs > 1:
        return None
    record = start.record
    adapts = start.learner.adapts and len(y) >= FEWEST_FOLDS and not (record and record.gain <= 0)
    steps = start.steps if adapts else 0
    parts = deal(len(y), steps, sum(each.numel() for each in model.network.parameters()), start)
    count, own = max(1, int(parts.max(initial=-1)) + 1), model.prepare(x)
    target = start.target.standardize(y).to(own.dtype) if start.form.regression else y
    fitted: list[dict[str, Tensor]] = []
    scores: list[NDArray[np.float64]] = []
    for fold in range(count):
        held = torch.from_numpy(parts == fold)
        if steps:
            found = start.learner.adapt(start.state, (own[~held], target[~held]), steps)
        else:
            found = start.learner.theta(start.state)
        known = {name for name, _ in model.network.named_parameters()}
        fitted.append({name: value.detach().clone() for name, value in found.items() if name in known})
        scores.append(_scores(model, fitted[-1], x[held], y[held]))
    rest = {name: value.detach() for name, value in model.network.named_parameters()}
    folds = {name: torch.stack([each.get(name, rest[name]) for each in fitted]) for name in rest}
    calibration = np.sort(np.concatenate(scores))
    left_out = len(y) // count if steps else 1
    rank = math.ceil((1 - ALPHA) * (len(calibration) + left_out) - 1e-9)
    limit = float(calibration[rank - 1]) if rank <= len(calibration) else math.inf
    threshold = limit if math.isfinite(limit) else None
    exchangeable = start.experiment.data.split == "random"
    return Sets(model, folds, Facts(len(y), count, left_out, steps, rank, threshold, exchangeable))


def deal(rows: int, steps: int, parameters: int, start: MetaModel) -> NDArray[np.int64]:
    """Returns the fold of each row [rows], -1 for one that adapts in every model; labels have no part in it."""
    if not steps:
        return np.zeros(rows, dtype=np.int64)
    most = min(MOST_FOLDS, max(FEWEST_FOLDS, MOST_VALUES // max(1, parameters)))
    size = min(math.ceil(rows / most), rows // FEWEST_FOLDS)
    folds = min(most, rows // size)
    drawn = row_draws(start.experiment.runtime.seed, "sets", 0, site_keys([""]).repeat(rows), np.arange(rows))
    found = np.full(rows, -1, dtype=np.int64)
    found[np.argsort(drawn, kind="stable")[: folds * size]] = np.repeat(np.arange(folds), size)
    return found


def _output(model: SiteModel, parameters: Mapping[str, Tensor], x: Tensor) -> NDArray[np.float64]:
    """Returns what the model gives for raw rows with other parameters of its network."""
    with torch.no_grad():
        outputs: Tensor = functional_call(model, {f"network.{name}": value for name, value in parameters.items()}, (x,))
    return outputs.double().numpy()


def _scores(model: SiteModel, parameters: Mapping[str, Tensor], x: Tensor, y: Tensor) -> NDArray[np.float64]:
    """Returns how badly rows fit a fold's model [n]; infinite where its outputs are no numbers."""
    outputs, own = _output(model, parameters, x), y.numpy()
    if model.form.regression:
        found = np.abs(np.log(own) - np.log(outputs)) if model.log else np.abs(own - outputs)
    else:
        found = 1 - outputs[np.arange(len(own)), own]
    return np.nan_to_num(np.asarray(found, dtype=np.float64), nan=math.inf)
