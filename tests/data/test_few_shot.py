from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmeta.data import (
    ArrayPopulation,
    Episodes,
    Standardisation,
    class_codes,
    evaluation_tasks,
    few_shot,
    gather,
    load,
    load_site,
    split,
    training_tasks,
)
from fedmeta.data.batches import square_sides, turn
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Data
from tests.data.made import npz, population

AS_IS = Standardisation(np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32))


def made(classes: list[int], drawings: int = 8, **keys: Any) -> tuple[ArrayPopulation, Data]:
    """Sites with so many classes of so many drawings each; a pixel holds the class, another one the row."""
    sizes = [count * drawings for count in classes]
    labels = np.concatenate([np.repeat(np.arange(count), drawings) for count in classes])
    data = Data(**{"ways": 3, **keys})
    there = population(sizes, labels=labels.tolist(), classes=max(classes))
    images = np.zeros((len(labels), 3, 3), np.float32)
    images[:, 0, 0], images[:, 0, 1] = there.y + 1, np.arange(len(labels))
    found = few_shot(replace(there, x=images, feature_names=()), data)
    assert isinstance(found, ArrayPopulation)
    return found, data


def drawn(there: ArrayPopulation, episodes: Episodes, task: int) -> list[list[tuple[int, int, int, int]]]:
    """The (way, class, turns, row) of the support and of the query rows of a task."""
    found = []
    for padded in (episodes.support, episodes.query):
        mask = padded.mask[task]
        assert padded.labels is not None
        turns = np.zeros_like(padded.rows) if padded.turns is None else padded.turns
        rows = padded.rows[task][mask]
        columns = (padded.labels[task][mask], there.y[rows], turns[task][mask], rows)
        found.append([tuple(row) for row in np.stack(columns, axis=1).tolist()])
    return found


@given(
    classes=st.lists(st.integers(3, 7), min_size=1, max_size=4),
    shots=st.integers(1, 5),
    query=st.integers(1, 20),
    rotations=st.booleans(),
    round_number=st.integers(1, 9),
)
def test_a_task_has_n_classes_of_its_own_and_k_rows_of_each(
    classes: list[int], shots: int, query: int, rotations: bool, round_number: int
) -> None:
    there, data = made(classes, shots=shots, query=query, rotations=rotations)
    rows = split(there, data, 0)
    training = training_tasks(rows, there.all_sites, round_number, data)
    scored_rows = evaluation_tasks(rows, there.all_sites, 2, data)
    assert (training.scored, scored_rows.scored) == (False, True)
    train, test = rows.train_rows(there.all_sites), rows.test_rows(there.all_sites)
    for episodes, repeats in ((training, 1), (scored_rows, 2)):
        for task in range(len(there) * repeats):
            site = task // repeats
            support, questions = drawn(there, episodes, task)
            for way in range(3):
                adapts = [row for row in support if row[0] == way]
                scored = [row for row in questions if row[0] == way]
                assert len({(label, turns) for _, label, turns, _ in adapts + scored}) == 1
                assert len({row for *_, row in adapts + scored}) == len(adapts + scored)
                assert {row for *_, row in adapts} <= set(train.of(site).tolist())
                if episodes is training:
                    # Half of eight drawings train.
                    assert len(adapts) == min(shots, 3)
                    assert len(scored) == min(max(1, query // 3), 4 - len(adapts))
                    assert {row for *_, row in scored} <= set(train.of(site).tolist())
                else:
                    assert len(adapts) == min(shots, 4)
                    own = [row for row in test.of(site).tolist() if there.y[row] == adapts[0][1]]
                    assert sorted(row for *_, row in scored) == sorted(own)
            assert len({(label, turns) for _, label, turns, _ in support}) == 3
            assert {turns for _, _, turns, _ in support} <= ({0, 1, 2, 3} if rotations else {0})


def test_each_stretch_of_a_task_has_its_classes_in_proportion() -> None:
    there, data = made([6, 7], drawings=16, shots=4, query=9)
    rows = split(there, data, 0)
    for episodes in (
        training_tasks(rows, there.all_sites, 1, data),
        evaluation_tasks(rows, there.all_sites, 2, data),
    ):
        for padded in (episodes.support, episodes.query):
            assert padded.labels is not None
            assert padded.mask.all()
            turns = padded.labels.reshape(len(padded.labels), -1, 3)
            assert turns.shape[1] > 1
            assert (np.sort(turns, axis=2) == np.arange(3)).all()


@pytest.mark.parametrize("how", ["random", "blocks"])
@pytest.mark.parametrize(("share", "count"), [(0.5, 4), (0.25, 2)])
def test_each_class_is_split(how: Any, share: float, count: int) -> None:
    there, data = made([5, 9], split=how, test=share)
    test = split(there, data, 3).test_rows(there.all_sites)
    for site in range(2):
        rows = test.of(site)
        assert (np.bincount(there.y[rows]) == count).all()
        if how == "blocks":
            places = {row: place for place, row in enumerate(there.sites.of(site).tolist())}
            assert all(places[row] % 8 >= 8 - count for row in rows.tolist())


def test_numbers_are_drawn_anew_and_every_class_is_as_likely() -> None:
    there, data = made([6] * 40, rotations=True)
    rows = split(there, data, 0)
    tallies = np.zeros((3, 6, 4))
    for round_number in range(30):
        episodes = training_tasks(rows, there.all_sites, round_number, data)
        for task in range(40):
            for way, label, turns, _ in drawn(there, episodes, task)[0]:
                tallies[way, label, turns] += 1
    expected = 30 * 40 / 24
    assert (abs(tallies - expected) < 4.5 * np.sqrt(expected)).all()


def test_evaluation_is_the_same_each_time_and_its_tasks_differ() -> None:
    there, data = made([7, 7])
    rows = split(there, data, 0)
    first, again = (evaluation_tasks(rows, there.all_sites, 5, data) for _ in range(2))
    other = evaluation_tasks(split(there, data, 1), there.all_sites, 5, data)
    assert [drawn(there, first, task) for task in range(10)] == [drawn(there, again, task) for task in range(10)]
    assert len({str(drawn(there, episodes, task)) for episodes in (first, other) for task in range(10)}) == 20


def test_a_sites_tasks_depend_neither_on_the_cohort_nor_on_how_a_node_numbers_classes() -> None:
    there, data = made([5, 7, 4], rotations=True)
    other = replace(there, y=8 - there.y)
    cohort = np.array([2, 0])
    for draw in (
        lambda of, sites: training_tasks(split(of, data, 0), sites, 4, data),
        lambda of, sites: evaluation_tasks(split(of, data, 0), sites, 1, data),
    ):
        whole, part, renumbered = draw(there, there.all_sites), draw(there, cohort), draw(other, there.all_sites)
        for place, site in enumerate(cohort):
            assert drawn(there, part, place) == drawn(there, whole, site)
        for site in range(3):
            assert drawn(there, renumbered, site) == drawn(there, whole, site)


def test_batches_hold_drawn_labels_and_turned_images() -> None:
    there, data = made([6, 6], rotations=True)
    episodes = training_tasks(split(there, data, 0), there.all_sites, 1, data)
    run = tuple(reversed(there.class_names))
    batch = gather(there, episodes, AS_IS, class_codes(there.class_names, run))
    turned = set()
    for padded, (x, y, mask) in ((episodes.support, batch.support), (episodes.query, batch.query)):
        assert padded.labels is not None
        assert padded.turns is not None
        assert mask.bool().numpy().tolist() == padded.mask.tolist()
        for task, place in np.argwhere(padded.mask).tolist():
            image = there.x[padded.rows[task, place]]
            assert y[task, place] == 2 - padded.labels[task, place]
            assert x[task, place].tolist() == np.rot90(image, padded.turns[task, place]).tolist()
            turned.add(int(padded.turns[task, place]))
    assert len(turned) > 1


def test_classes_with_too_few_rows_are_not_drawn() -> None:
    """One class has a single row: it trains or tests, and a task needs both; so tasks are of the other two."""
    there = population([17], labels=[0] * 8 + [1] * 8 + [2], classes=3)
    data = Data(ways=3, shots=2)
    found = few_shot(there, data)
    assert isinstance(found, ArrayPopulation)
    rows = split(found, data, 0)
    for episodes in (
        training_tasks(rows, found.all_sites, 1, data),
        evaluation_tasks(rows, found.all_sites, 1, data),
    ):
        support, query = drawn(found, episodes, 0)
        assert {label for _, label, _, _ in support + query} == {0, 1}
        assert {way for way, *_ in support + query} == {0, 1}
        assert episodes.support.mask.tolist() == [[True, True, True, True, False, False]]


def test_sites_with_too_few_classes_are_left_out() -> None:
    there, _ = made([4, 2, 3], ways=3)
    assert (there.names, there.class_names) == (("site-000", "site-002"), ("way 0", "way 1", "way 2"))
    turned, _ = made([4, 2, 3], ways=11, rotations=True)
    assert (turned.names, turned.class_names[10]) == (("site-000", "site-002"), "way 10")
    with pytest.raises(FedmetaError, match=r"data\.ways = 5: no site has so many classes; the most that one has is 4"):
        made([4, 2], ways=5)


def test_what_has_no_classes_to_number() -> None:
    for there in (
        load(Data(source="synthetic")),
        replace(population([4]), class_names=(), y=np.zeros(4)),
        replace(population([4]), tokens=True),
    ):
        with pytest.raises(FedmetaError, match=r"data\.ways = 2: few-shot tasks renumber a site's own classes"):
            few_shot(there, Data(ways=2))


def test_what_cannot_be_turned() -> None:
    for shape, sides in (((5, 5), (0, 1)), ((3, 5, 5), (1, 2)), ((5, 5, 4), (0, 1)), ((1, 3, 3), (1, 2))):
        assert square_sides(shape) == sides
    for shape in ((5,), (5, 6), (3, 5, 6), (5, 6, 3), (7, 5, 5), (2, 2, 2, 2)):
        with pytest.raises(FedmetaError, match=r"data\.rotations needs square images, not rows of shape"):
            square_sides(shape)
    with pytest.raises(FedmetaError, match="rotations"):
        few_shot(population([6]), Data(ways=2, rotations=True))


@pytest.mark.parametrize(("shape", "axes"), [((4, 3, 5, 5), (1, 2)), ((4, 5, 5, 3), (0, 1)), ((4, 5, 5), (0, 1))])
def test_images_turn_by_quarters(shape: tuple[int, ...], axes: tuple[int, int]) -> None:
    images = np.random.default_rng(0).integers(0, 9, shape).astype(np.uint8)
    found = turn(torch.from_numpy(images.copy()), np.arange(4))
    for quarters in range(4):
        np.testing.assert_array_equal(found[quarters].numpy(), np.rot90(images[quarters], quarters, axes))


def test_a_nodes_own_file(tmp_path: Path) -> None:
    path = npz(tmp_path, site=None)
    there = load_site(Data(ways=3), path, "mine")
    assert (there.names, there.class_names) == (("mine",), ("way 0", "way 1", "way 2"))
