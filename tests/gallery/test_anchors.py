"""Anchors: published k-means, boxes and scores by hand, exact meta-gradients, and what learning them is worth."""

from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.gallery import measure
from experiments.gallery.anchors import anchors as own
from fedmeta.errors import FedmetaError
from fedmeta.learners import build
from tests.problems.test_problem import directional

DATA = Path(__file__).parents[3] / "shared/data"
needs_boxes = pytest.mark.skipif(not (DATA / "boxes").exists(), reason=f"the boxes are not in {DATA}")
needs_digits = pytest.mark.skipif(not (DATA / "qmnist_writers").exists(), reason=f"the digits are not in {DATA}")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Four writers whose digits are bars and rings, sixty each."""
    random = np.random.default_rng(0)
    x = np.zeros((240, 28, 28), np.uint8)
    for image in x:
        high, wide = random.integers(8, 21, 2)
        image[4 : 4 + high, 4 : 4 + wide] = 255
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    np.savez(path, x=x, site=np.repeat(np.arange(4), 60))
    return str(path)


def test_overlaps_are_those_by_hand():
    one, other = torch.tensor([[5.0, 5, 4, 4]]), torch.tensor([[5.0, 5, 4, 4], [7, 5, 4, 4], [20, 5, 4, 4]])
    assert own.box_iou(one, other)[0].tolist() == pytest.approx([1, 8 / 24, 0])
    assert own.shape_iou(torch.tensor([[2.0, 4]]), torch.tensor([[4.0, 2]])).item() == pytest.approx(4 / 12)


@pytest.mark.slow
@needs_boxes
def test_k_means_on_voc_has_the_published_overlap():
    """Redmon and Farhadi 2017, table 1: mean IoU 61.0 for five anchors, 67.2 for nine."""
    boxes = own.Boxes(str(DATA / "boxes/boxes.npz")).boxes
    voc = torch.cat([each for name, each in boxes.items() if name.startswith("voc")])
    for count, published in ((5, 61.0), (9, 67.2)):
        found = own.shape_iou(voc, own.k_means(voc, count, 0)).amax(1).mean()
        assert float(100 * found) == pytest.approx(published, abs=1.5)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(FedmetaError, match=r"problem\.path = .*none\.npz: there is no such file"):
        own.Boxes(str(tmp_path / "none.npz"))


def test_scenes_have_their_digits_where_the_boxes_are(digits):
    problem = own.Scenes(digits)
    for site in problem.sites():
        support, query = problem.task(site, "test", 0, 0)
        assert not any(torch.equal(one, other) for one in support["images"] for other in query["images"])
        for image, boxes, mask in zip(query["images"], query["boxes"], query["mask"], strict=True):
            inside = torch.zeros(own.SIDE, own.SIDE, dtype=torch.bool)
            for x, y, wide, high in boxes[mask > 0].round().tolist():
                inside[int(y - high / 2) : int(y + high / 2 + 1), int(x - wide / 2) : int(x + wide / 2 + 1)] = True
            assert 2 <= int(mask.sum()) <= 4
            assert image[0].sum() > 0
            assert not image[0][~inside].any()


def perfect(problem, data):
    """Returns what a detector without fault would predict."""
    found = torch.full((len(data["boxes"]), len(problem.anchors), 5, 12, 12), -20.0)
    for number, (boxes, mask) in enumerate(zip(data["boxes"], data["mask"], strict=True)):
        for x, y, wide, high in boxes[mask > 0].tolist():
            row, column = int(y / own.CELL), int(x / own.CELL)
            values = torch.tensor([9.0, x / own.CELL - column, y / own.CELL - row, np.log(wide), np.log(high)])
            found[number, 0, :, row, column] = values
    return found


def test_a_faultless_detector_has_full_scores_and_half_of_it_has_half_the_recall(digits):
    problem = own.Scenes(digits, "12x12")
    data = problem.task("writer-001", "test", 0, 0).query
    right = perfect(problem, data)
    problem.predicted = lambda parameters, images: right
    assert problem.evaluate({}, data) == {"ap50": pytest.approx(1), "recall50": pytest.approx(1)}
    right[:4, :, 0] = -20
    kept = data["mask"][4:].sum() / data["mask"].sum()
    found = problem.evaluate({}, data)
    assert float(found["recall50"]) >= float(kept)
    right[:4, :, 3:] = 5
    assert float(problem.evaluate({}, data)["recall50"]) == pytest.approx(float(kept))


def test_the_loss_is_that_of_the_equation(digits):
    """One anchor, so that its share is 1: BCE over all cells, and squares at the boxes' cells."""
    problem = own.Scenes(digits, "12x12")
    data, parameters = problem.task("writer-000", "train", 1, 0).support, problem.init(0)
    found = problem.predicted(parameters, data["images"])
    target, off = torch.zeros_like(found[:, 0, 0]), 0.0
    for number, (boxes, mask) in enumerate(zip(data["boxes"], data["mask"], strict=True)):
        for x, y, wide, high in boxes[mask > 0].tolist():
            row, column = int(y / own.CELL), int(x / own.CELL)
            wanted = torch.tensor([x / own.CELL - column, y / own.CELL - row, np.log(wide), np.log(high)])
            off += float((found[number, 0, 1:, row, column] - wanted).square().sum())
            target[number, row, column] = 1
    binary = torch.nn.functional.binary_cross_entropy_with_logits(found[:, 0, 0], target, reduction="sum")
    assert float(problem.inner(parameters, data)) == pytest.approx(
        (off + float(binary)) / float(data["mask"].sum()), rel=1e-4
    )


def test_anchors_have_an_exact_meta_gradient_and_no_site_moves_them(digits):
    problem = own.Scenes(digits)
    learner = build("maml", problem, inner_steps=2, inner_lr=0.01)
    state = {name: value.double() for name, value in learner.init(1).items()}
    task = problem.task("writer-002", "train", 1, 0)
    task = type(task)(*({name: value.double() for name, value in part.items()} for part in task))
    gradient, _ = learner.meta_gradient(state, task)
    assert gradient["anchors"].abs().min() > 0
    assert directional(learner, state, task, gradient) < 1e-4  # a difference may cross kinks of ReLU and of overlaps
    assert torch.equal(learner.adapt(state, task.support)["anchors"], state["anchors"])
    fixed = build("maml", own.Scenes(digits, learned=False))
    state = {name: value.double() for name, value in fixed.init(1).items()}
    assert "anchors" not in fixed.meta_gradient(state, task)[0]


def scores(problem, state, sites, steps=3):
    return measure.scores(build("maml", problem, inner_steps=3, inner_lr=0.05), state, problem, sites, steps)


@pytest.mark.slow
@needs_digits
def test_learned_features_and_anchors_find_a_new_writers_digits():
    result, problem = measure.run("anchors"), own.Scenes()
    new = measure.new_sites(result)
    learned = scores(problem, result.meta_state, new)
    zero = scores(problem, build("maml", problem).init(0), new)
    assert learned["ap50"][:, -1].mean() > learned["ap50"][:, 0].mean()
    assert learned["ap50"][:, -1].mean() > zero["ap50"][:, -1].mean() + 0.3
