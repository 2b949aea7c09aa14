"""A site that chooses its steps does so on its support rows, and needs a reason to leave the usual number."""

import math

import pytest
import torch
from torch import Tensor, nn

from fedmeta import engines
from fedmeta.engines.step_selection import FOLDS, choose_steps, last_good_steps
from fedmeta.engines.weighted_sum import Figures
from fedmeta.learners import build
from fedmeta.task import Batch, Rows

STEPS = 3

PARTS = 5
"""Into how many parts rows are dealt here."""


def rows(sites: int, n: int, mask: Tensor | None = None) -> Rows:
    x = torch.randn(sites, n, 4, generator=torch.Generator().manual_seed(0))
    return x, torch.zeros(sites, n, dtype=torch.long), torch.ones(sites, n) if mask is None else mask


def with_losses(losses: Tensor, scores: Tensor | None = None) -> Figures:
    return {"accuracy": (-losses).exp() if scores is None else scores, "loss": losses}


def test_takes_the_steps_that_cost_least() -> None:
    def evaluate(batch: Batch) -> Figures:
        assert batch.sites == 2 * PARTS
        noise = torch.linspace(0, 0.01, PARTS).repeat(2)[:, None]
        falling = torch.tensor([[1.0, 0.5, 0.2, 0.4], [0.2, 0.5, 0.7, 0.9]]).repeat_interleave(PARTS, 0)
        return with_losses(falling + noise)

    assert choose_steps(evaluate, rows(2, 10), folds=PARTS).tolist() == [2, 0]


def test_takes_the_usual_number_where_the_gain_is_within_its_own_spread() -> None:
    def evaluate(batch: Batch) -> Figures:
        gains = torch.tensor([1.0, -0.9, 0.8, -0.9, 0.2])[:, None]
        return with_losses(torch.cat([1 - gains, torch.ones(PARTS, STEPS)], 1))

    assert choose_steps(evaluate, rows(1, 10), margin=1.0, folds=PARTS).tolist() == [STEPS]
    assert choose_steps(evaluate, rows(1, 10), usual=1, margin=1.0, folds=PARTS).tolist() == [1]
    assert choose_steps(evaluate, rows(1, 10), usual=99, margin=0.0, folds=PARTS).tolist() == [0]


def test_a_number_in_between_must_beat_both_without_a_doubt() -> None:
    def evaluate(spread: float, none: float) -> list[int]:
        gains = spread * torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0])[:, None]
        losses = torch.cat([torch.full((PARTS, 1), none), 0.5 - gains, torch.ones(PARTS, 2)], 1)
        found = with_losses(losses)
        return choose_steps(lambda batch: found, rows(1, 10), between=4.0, folds=PARTS).tolist()

    # It gains 0.5 on the usual number, with a standard error of 0.45 times the spread.
    assert evaluate(0.2, none=1.5) == [1]
    assert evaluate(0.4, none=1.5) == [STEPS]
    assert evaluate(0.2, none=0.6) == [0]


def test_a_loss_without_fewer_rows_wrong_is_no_reason() -> None:
    losses = torch.tensor([[0.2, 1.0]]).expand(FOLDS, 2)
    for scores, expected in (([0.8, 0.8], 1), ([0.8, 0.7], 0), ([0.7, 0.8], 1)):
        found = with_losses(losses, torch.tensor([scores]).expand(FOLDS, 2))
        assert choose_steps(lambda batch, found=found: found, rows(1, 10)).tolist() == [expected]


def test_errors_count_beside_the_loss_and_one_confident_mistake_is_not_all() -> None:
    losses = torch.tensor([[0.7, 0.7], [0.7, 0.7], [0.7, 0.7], [0.7, 0.7], [0.7, 50.0]])
    scores = torch.tensor([[0.2, 0.9]] * 4 + [[0.2, 0.5]])
    assert choose_steps(lambda batch: with_losses(losses, scores), rows(1, 10), margin=0.0, folds=PARTS).tolist() == [1]
    assert choose_steps(lambda batch: with_losses(losses), rows(1, 10), margin=0.0, folds=PARTS).tolist() == [0]


def test_steps_of_a_regression_that_diverge_are_not_taken() -> None:
    x, _, mask = rows(1, 10)
    losses = torch.tensor([[1.0, 0.5, torch.inf]] * 2 + [[1.0, 0.5, 1e30]] + [[1.0, 0.5, torch.nan]] * 2)
    assert choose_steps(lambda batch: with_losses(losses), (x, torch.zeros(1, 10), mask), folds=PARTS).tolist() == [1]


@pytest.mark.parametrize("folds", [3, 5, FOLDS])
def test_folds_hold_out_each_row_once_and_never_train_on_it(folds: int) -> None:
    mask = torch.ones(2, 7)
    mask[1, 4:] = 0
    seen: list[Batch] = []

    def evaluate(batch: Batch) -> Figures:
        seen.append(batch)
        return with_losses(torch.ones(batch.sites, STEPS + 1))

    own = rows(2, 7, mask)
    choose_steps(evaluate, own, folds=folds)
    train = seen[0].support[2].reshape(2, folds, 7)
    x, _, scored = seen[0].query
    assert x.shape[1] == math.ceil(7 / folds), "no row is computed for nothing"
    for site in range(2):
        scored_rows = x.reshape(2, folds, -1, 4)[site][scored.reshape(2, folds, -1)[site] > 0]
        real = own[0][site][mask[site] > 0]
        assert sorted(scored_rows.tolist()) == sorted(real.tolist())
        for fold in range(folds):
            held = x.reshape(2, folds, -1, 4)[site, fold][scored.reshape(2, folds, -1)[site, fold] > 0].tolist()
            trained = own[0][site][train[site, fold] > 0].tolist()
            assert sorted(held + trained) == sorted(real.tolist())


def test_folds_have_the_classes_in_proportion() -> None:
    seen: list[Batch] = []

    def evaluate(batch: Batch) -> Figures:
        seen.append(batch)
        return with_losses(torch.ones(batch.sites, STEPS + 1))

    x, _, mask = rows(1, 20)
    for classes in (2, 5, 10):
        choose_steps(evaluate, (x, torch.arange(20)[None] % classes, mask), folds=10)
        _, y, scored = seen[-1].query
        assert scored.all(), "no fold takes all rows of a class"
        assert (y[:, 0] != y[:, 1]).all()


def test_rows_of_a_class_that_is_nowhere_else_do_not_judge() -> None:
    seen: list[Batch] = []

    def evaluate(batch: Batch) -> Figures:
        seen.append(batch)
        return with_losses(torch.tensor([[0.1, 1.0]]).expand(batch.sites, 2))

    x, _, mask = rows(3, 5)
    mask[2, 1:] = 0
    y = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 3, 3], [0, 0, 0, 0, 0]])
    # One row of each class: the usual number. One pair: it scored. A single row: no number at all.
    assert choose_steps(evaluate, (x, y, mask)).tolist() == [1, 0, 0]
    assert seen[0].query[2].reshape(3, -1).sum(1).tolist() == [0, 2, 0]
    scored = seen[0].query[2].flatten() > 0
    assert sorted(seen[0].query[0].flatten(0, 1)[scored].tolist()) == sorted(x[1, 3:].tolist())


def test_no_rows_and_diverging_steps_mean_no_adaptation() -> None:
    def evaluate(batch: Batch) -> Figures:
        losses = torch.ones(batch.sites, STEPS + 1)
        losses[:, 1:] = torch.nan
        return with_losses(losses)

    assert choose_steps(evaluate, rows(2, 5, torch.tensor([[1.0] * 5, [0.0] * 5]))).tolist() == [0, 0]


def test_sites_that_gain_adapt_and_most_that_adapting_hurts_do_not() -> None:
    """The start knows the rule of the last sites, whose few rows and long steps can only spoil it."""
    sites, gaining, steps = 200, 100, 5
    generator = torch.Generator().manual_seed(1)
    x, more = (torch.randn(sites, rows, 20, generator=generator) for rows in (20, 200))

    def labels(x: Tensor) -> Tensor:
        other, known = (x[..., part].sum(-1) > 0 for part in (slice(4, 8), slice(4)))
        return torch.cat([other[:gaining], known[gaining:]]).long()

    wrong = torch.rand(sites, 20, generator=generator) < 0.1
    y = torch.where(wrong, 1 - labels(x), labels(x))
    learner = build("maml", nn.Linear(20, 2), inner_steps=steps, inner_lr=3.0)
    weight = torch.zeros(2, 20)
    weight[0, :4], weight[1, :4] = -1.0, 1.0
    state = {"theta.weight": weight, "theta.bias": torch.zeros(2)}

    def evaluate(batch: Batch) -> Figures:
        return engines.evaluate(learner, state, batch, "vmap", steps=steps)

    chosen = choose_steps(evaluate, (x, y, torch.ones(sites, 20)))
    assert (chosen[:gaining] == steps).float().mean() > 0.8
    assert (chosen[gaining:] < steps).float().mean() > 0.6
    scored_rows = evaluate(Batch((x, y, torch.ones(sites, 20)), (more, labels(more), torch.ones(sites, 200))))[
        "accuracy"
    ]
    none, usual, gated = scored_rows[:, 0], scored_rows[:, steps], scored_rows.gather(1, chosen[:, None])[:, 0]
    gained, lost = (usual - none)[:gaining].mean(), (none - usual)[gaining:].mean()
    assert min(gained, lost) > 0.1
    assert (gated - usual)[gaining:].mean() > 0.6 * lost, "most of what adapting costs is won back"
    assert (usual - gated)[:gaining].mean() < 0.15 * gained, "little of what it gains is lost"


@pytest.mark.parametrize("worst", [30.0, 1e9, math.inf, math.nan])
def test_steps_that_blow_up_in_one_fold_are_out_of_the_question(worst: float) -> None:
    """One fold of many that diverges is no significant difference: its spread is as large as its mean."""

    def evaluate(batch: Batch) -> Figures:
        losses = torch.tensor([1.0, 0.6, 0.5, 0.4]).repeat(PARTS, 1).double()
        losses[2, 2:] = worst
        return {"rmse": losses.sqrt(), "loss": losses}

    x, _, mask = rows(1, 10)
    assert choose_steps(evaluate, (x, torch.zeros(1, 10), mask), folds=PARTS).tolist() == [1]
    assert choose_steps(evaluate, (x, torch.zeros(1, 10), mask), usual=1, folds=PARTS).tolist() == [1]


def test_a_site_goes_back_to_its_last_good_step() -> None:
    """Where all of a site's rows together blow up, though its folds did not."""
    inf, nan = math.inf, math.nan
    losses = torch.tensor(
        [
            [1.0, 0.5, 0.4, 0.3],
            [1.0, 0.5, 8.0, 80.0],
            [1.0, 40.0, 0.1, 0.1],
            [0.1, 0.05, inf, nan],
            [nan, nan, nan, nan],
        ]
    )
    found = last_good_steps(lambda batch: {"loss": losses}, rows(5, 4), torch.tensor([3, 3, 3, 3, 3]))
    assert found.tolist() == [3, 1, 0, 1, 0]
    found = last_good_steps(lambda batch: {"loss": losses}, rows(5, 4), torch.tensor([1, 1, 0, 1, 0]))
    assert found.tolist() == [1, 1, 0, 1, 0]


@pytest.mark.parametrize(("errors", "chosen"), [(0.0, STEPS), (1.0, STEPS), (1.2, STEPS), (1.3, 0), (3.0, 0)])
def test_not_adapting_must_be_better_by_one_and_a_quarter_standard_errors(errors: float, chosen: int) -> None:
    spread = 0.2 * torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0])
    standard_error = float((spread.square().mean() / (PARTS - 1)).sqrt())
    losses = torch.cat([(1 - errors * standard_error - spread)[:, None], torch.ones(PARTS, STEPS)], 1)
    scores = torch.tensor([[0.5 + 1e-6, 0.5, 0.5, 0.5]]).expand(PARTS, -1)
    assert choose_steps(lambda _: with_losses(losses, scores), rows(1, 10), folds=PARTS).tolist() == [chosen]
