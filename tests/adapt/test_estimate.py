"""The choice of steps and the honesty of the estimate."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedmeta.adapt import estimate
from fedmeta.adapt.estimate import _NestedCV, choose, cross_validate, leans_on_record
from fedmeta.adapt.initialization import MetaModel, Record
from fedmeta.adapt.intervals import LEVEL, Gain, accuracy, paired_gain, rmse, shared_excess
from tests.adapt.finished import hospitals, rows, run


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> MetaModel:
    tmp = tmp_path_factory.mktemp("judging")
    return run(tmp, hospitals(tmp / "hospitals"))[1]


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> MetaModel:
    tmp = tmp_path_factory.mktemp("judging-numbers")
    # Steps four times as long make models of nearly the same rows differ wildly, and then no few rows can tell.
    return run(tmp, hospitals(tmp / "hospitals", regression=True), "learner.inner_lr=0.05")[1]


def patients(start: MetaModel, seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, score = rows(seed, count, 3.0)
    prepared = ((torch.from_numpy(x) - start.mean) / start.scale).float()
    if start.form.regression:
        return prepared, torch.from_numpy(score).float()
    return prepared, torch.from_numpy((score < 0).astype(np.int64))


def test_accuracy_has_the_interval_of_clopper_and_pearson() -> None:
    """Figures of the published example, 90 %: 10 of 10, and 8 of 10."""
    sure = accuracy(np.ones(10), np.ones(10, dtype=np.int64))
    assert (sure.low, sure.high) == pytest.approx((0.05 ** (1 / 10), 1.0))
    eight = accuracy(np.array([0.75, 1.0]), np.array([8, 2]))
    assert (eight.score, eight.rows) == (0.8, 10)
    assert (eight.low, eight.high) == pytest.approx((0.4931, 0.9632), abs=1e-4)
    mirrored = accuracy(np.array([0.2]), np.array([10]))
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - eight.high, 1 - eight.low))


def test_models_that_share_their_rows_are_worth_fewer_rows() -> None:
    twenty = np.full(20, 2, dtype=np.int64)
    assert shared_excess(twenty) == pytest.approx(1 + 20 * 2 / 38)
    assert shared_excess(np.array([7])) == 1.0
    half = accuracy(np.full(20, 0.8), twenty, excess=2.0)
    assert (half.score, half.rows) == (0.8, 40)
    plain = accuracy(np.full(20, 0.8), np.ones(20, dtype=np.int64))
    assert (half.low, half.high) == pytest.approx((plain.low, plain.high))
    errors = np.linspace(1.0, 2.0, 20)
    wide, narrow = (rmse(errors, twenty, excess) for excess in (4.0, 1.0))
    assert np.log(wide.high / wide.score) == pytest.approx(2 * np.log(narrow.high / narrow.score))


def test_rmse_has_students_interval_on_the_logarithm() -> None:
    draw = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        found = rmse(np.abs(draw.normal(size=30)), np.ones(30, dtype=np.int64))
        covered += found.low <= 1.0 <= found.high
    assert covered / 1000 == pytest.approx(LEVEL, abs=0.04)
    assert rmse(np.array([2.0]), np.array([1])).high == np.inf
    assert rmse(np.zeros(5), np.ones(5, dtype=np.int64)).high == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("count", [1, 2, 7, 40, 101, 1003])
def test_each_row_is_set_aside_once(start: MetaModel, count: int, blocks: bool) -> None:
    x, y = patients(start, 0, count)
    cv = _NestedCV(start.learner, start.state, x, y, 3, blocks)
    parts = cv.parts()
    sizes = np.bincount(parts)
    assert len(parts) == count
    assert sizes.max() - sizes.min() <= 1
    if blocks:
        assert np.all(np.diff(parts) >= 0)


def test_what_a_part_scores_is_what_the_learner_gives_without_it(start: MetaModel) -> None:
    """The estimate against its definition: one part at a time, by the learner's own adaptation."""
    x, y = patients(start, 3, 33)
    cv = _NestedCV(start.learner, start.state, x, y, 6, False)
    parts = cv.parts()
    steps = [part % 4 for part in range(parts.max() + 1)]
    before, after = cv.set_aside(parts, steps)
    for part, taken in enumerate(steps):
        held = torch.from_numpy(parts == part)
        own = start.learner.adapt(start.state, (x[~held], y[~held]), taken)
        for parameters, found in ((start.learner.theta(start.state), before), (own, after)):
            right = (start.learner.predict(parameters, x[held]).argmax(-1) == y[held]).float().mean()
            assert found[part] == pytest.approx(float(right), abs=1e-6)


def test_the_labels_set_aside_do_not_choose(start: MetaModel) -> None:
    """Turning the labels of one part round changes no choice but those of the others."""
    x, y = patients(start, 4, 40)
    cv = _NestedCV.of(start, x, y)
    parts = cv.parts()
    others = [np.flatnonzero(parts != part) for part in range(parts.max() + 1)]
    turned = torch.where(torch.from_numpy(parts == 5), 1 - cv.y, cv.y)
    other = _NestedCV(cv.learner, cv.state, cv.x, turned, cv.most, cv.blocks)
    assert cv.choices(others)[5] == other.choices(others)[5]


@pytest.mark.slow
def test_the_choice_is_the_same_however_rows_are_grouped(start: MetaModel, monkeypatch: pytest.MonkeyPatch) -> None:

    x, y = patients(start, 4, 40)
    found = cross_validate(start, x, y)
    monkeypatch.setattr(estimate, "GROUP_VALUES", 1)
    again = cross_validate(start, x, y)
    assert (found.chosen, found.before, found.after) == (again.chosen, again.before, again.after)
    assert choose(start, x, y) == found.chosen


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["start", "numbers"])
def test_intervals_cover_the_truth_on_many_rows(kind: str, request: pytest.FixtureRequest) -> None:
    """150 sites of 30 rows each, scored on 4 000 more: the target is 85 to 97 %, with room for chance."""
    start: MetaModel = request.getfixturevalue(kind)
    covered = 0
    for seed in range(150):
        x, y = patients(start, 1000 + seed, 4030)
        found = cross_validate(start, x[:30], y[:30])
        outputs = start.learner.predict(found.parameters, x[30:]).detach()
        if start.form.regression:
            truth = float((outputs[:, 0] - y[30:]).square().mean().sqrt())
        else:
            truth = float((outputs.argmax(-1) == y[30:]).float().mean())
        covered += found.best.low <= truth <= found.best.high
    assert 0.83 <= covered / 150 <= 0.99


def test_the_paired_difference_covers_the_true_one() -> None:
    """Two predictors of the same rows, whose true difference is known; 500 draws of 40 rows each."""
    draw, ones = np.random.default_rng(1), np.ones(40, dtype=np.int64)
    covered = {"accuracy": 0, "rmse": 0}
    for _ in range(500):
        common = draw.uniform(size=40)
        before, after = (common < 0.7).astype(float), ((common < 0.6) | (draw.uniform(size=40) < 0.5)).astype(float)
        gain = paired_gain("accuracy", before, after, ones, 1.0)
        covered["accuracy"] += gain.low <= 0.8 - 0.7 <= gain.high
        errors = draw.normal(size=(2, 40))
        errors[1] = 0.8 * errors[0] + 0.3 * errors[1]
        gain = paired_gain("rmse", np.abs(errors[0]), np.abs(errors[1]), ones, 1.0)
        covered["rmse"] += gain.low <= 1 - np.sqrt(0.64 + 0.09) <= gain.high
    assert all(0.85 <= count / 500 <= 0.97 for count in covered.values()), covered


def test_a_difference_that_few_rows_show_is_no_proof() -> None:
    one = np.ones(2, dtype=np.int64)
    assert paired_gain("accuracy", np.zeros(2), np.ones(2), one, 1.0).low < 0
    alone = paired_gain("rmse", np.ones(1), np.zeros(1), one[:1], 1.0)
    assert (alone.low, alone.high) == (-np.inf, np.inf)
    twenty = np.full(20, 2, dtype=np.int64)
    assert paired_gain("accuracy", np.full(20, 0.25), np.full(20, 0.75), twenty, shared_excess(twenty)).low > 0
    for worst in (np.inf, np.nan):
        blown = np.where(np.arange(20) == 3, worst, 0.1)
        gain = paired_gain("rmse", np.ones(20), blown, twenty, 1.0)
        assert gain.score == gain.high == -np.inf
        assert rmse(blown, twenty).score == np.inf


@pytest.mark.slow
@pytest.mark.parametrize(
    ("record", "steps"),
    [
        (None, "none"),
        (Record(40, 0.1, 0.05, 0.15, 0.1), "chosen"),
        (Record(40, 0.01, -0.02, 0.04, 0.4), "none"),
        (Record(40, -0.1, -0.15, -0.05, 0.8), "none"),
    ],
)
def test_where_rows_do_not_decide_the_training_sites_record_does(
    start: MetaModel, record: Record | None, steps: str
) -> None:
    own = replace(start, record=None)
    sites = (patients(own, seed, 8) for seed in range(100, 140))
    rows_that_do_not_decide = next(
        site for site in sites if (each := cross_validate(own, *site)).advice == "undecided" and each.gain.score > 0
    )
    own = replace(start, record=record)
    found = cross_validate(own, *rows_that_do_not_decide)
    assert found.advice == "undecided"
    assert found.steps == (found.chosen if steps == "chosen" else 0)
    assert cross_validate(own, *rows_that_do_not_decide, use="global").steps == 0


@pytest.mark.parametrize(
    ("gain", "count", "leans"), [(0.1, 6, True), (0.0, 6, False), (0.0, 20, True), (-0.1, 40, False)]
)
def test_few_rows_lean_on_the_record_only_where_their_own_estimate_is_better(
    start: MetaModel, gain: float, count: int, leans: bool
) -> None:
    own = replace(start, record=Record(40, 0.1, 0.05, 0.15, 0.1))
    found = cross_validate(own, *patients(own, 100, 6))
    found = replace(found, gain=Gain(gain, gain - 0.3, gain + 0.3), before=replace(found.before, rows=count))
    assert leans_on_record(own, found) is leans


def test_no_record_makes_a_site_take_what_its_rows_show_to_be_worse(start: MetaModel) -> None:
    own = replace(start, record=Record(40, 0.3, 0.2, 0.4, 0.0))
    worse = replace(cross_validate(own, *patients(own, 100, 6)), gain=Gain(-0.2, -0.3, -0.1))
    assert worse.advice == "global"
    assert not leans_on_record(own, worse)


@pytest.mark.slow
def test_there_are_three_answers(start: MetaModel) -> None:
    """A site that differs much, one that is as the average of all, and one whose steps are far too long."""
    start = replace(start, record=None)  # which would decide where the rows do not
    far = cross_validate(start, *patients(start, 100, 60))
    assert (far.advice, far.steps) == ("personal", far.chosen)
    x, score = rows(7, 40, 0.0)
    prepared = ((torch.from_numpy(x) - start.mean) / start.scale).float()
    labels = torch.from_numpy((score < 0).astype(np.int64))
    found = [cross_validate(start, prepared[part], labels[part]) for part in (slice(0, 20), slice(20, 40))]
    assert all(each.advice != "personal" for each in found)
    undecided = next((each for each in [cross_validate(start, *patients(start, 100, 6)), *found] if each.chosen), None)
    assert undecided is not None
    assert undecided.advice == "undecided"
    assert undecided.steps == 0
    assert undecided.gain.low <= 0 <= undecided.gain.high
    forced = cross_validate(start, *patients(start, 100, 6), use="personal")
    assert forced.steps == forced.chosen
    assert cross_validate(start, *patients(start, 100, 60), use="global").steps == 0
