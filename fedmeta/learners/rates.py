"""Inner rates, all multiplied by one number: how far sites adapt is a setting of evaluation, not of a learner."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from fedmeta.learners.learner import ALPHA, Learner, MetaState


def scale_inner_lr(learner: Learner, meta_state: MetaState, rate: float) -> tuple[Learner, dict[str, Tensor]]:
    """Returns a learner and a meta-state whose inner rates, given and learned, are multiplied by `rate`."""
    scaled = {name: value * rate if name.startswith(ALPHA) else value for name, value in meta_state.items()}
    return replace(learner, inner_lr=learner.inner_lr * rate), scaled
