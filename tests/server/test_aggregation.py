"""Aggregators against cases worked by hand, against Flower's own classes, and against false sites."""

from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy.bulyan import aggregate_n_closest_weights
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
from flwr.serverapp.strategy.multikrum import compute_distances
from torch import Tensor

from clients.app import app
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Server
from fedmeta.messages import TrainReply
from server import aggregation
from tests.server.digits import digits
from tests.server.test_strategy import strategy_over, train
from tests.several_nodes import NODE_IDS, SeveralNodes, breaks

ROBUST = ("median", "trimmed-mean", "krum", "multi-krum", "bulyan", "norm-bound")


def reply(values: list[list[float]], finite: list[bool] | None = None) -> TrainReply:
    """Returns one node's reply for sites a, b, ... whose gradients are these."""
    names = tuple("abcdefghijklmnopqrstuvwxyz"[: len(values)])
    good = np.array(finite if finite else [True] * len(values))
    gradient = {"theta": torch.tensor(values), "alpha": torch.tensor([row[0] for row in values])}
    return TrainReply(gradient, float(good.sum()), names, np.zeros(len(values)), good)


def combined(aggregator: str, values: list[list[float]], byzantine: float | int = 1, **keys: float) -> list[float]:
    found = aggregation.aggregate_replies([reply(values)], Server(aggregator=aggregator, byzantine=byzantine, **keys))
    assert found is not None
    assert found["theta"].dtype == torch.float64
    assert found["alpha"].shape == ()
    # Mixing multiplies matrices, which round by their shapes.
    first = float(found["theta"][0])
    assert float(found["alpha"]) == (pytest.approx(first) if keys.get("mixing") else first)
    return found["theta"].tolist()


# ---------------------------------------------------------------- by hand


def test_the_median_is_that_of_each_coordinate() -> None:
    assert combined("median", [[1.0, 9.0], [2.0, -90.0], [300.0, 7.0]]) == [2.0, 7.0]


def test_the_trimmed_mean_leaves_out_the_assumed_number_at_either_end() -> None:
    values = [[1.0, 5.0], [2.0, 6.0], [4.0, -900.0], [900.0, 7.0], [0.0, 0.0]]
    assert combined("trimmed-mean", values, 1) == pytest.approx([7 / 3, 11 / 3])
    assert combined("trimmed-mean", values, 2) == [2.0, 5.0]
    assert combined("trimmed-mean", values, 0.2) == pytest.approx([7 / 3, 11 / 3])


def test_krum_takes_the_gradient_in_the_densest_place() -> None:
    # Sums of squared distances to the n - f - 2 = 2 nearest: 5, 2, 2 (to 1.5 and 2), 5 / ... ; 100 is far from all.
    values = [[0.0, 0.0], [1.0, 0.0], [1.5, 0.0], [2.25, 0.0], [100.0, 0.0]]
    assert combined("krum", values) == [1.5, 0.0]
    # n - f - 2 = 2 of them: those at 1.5 and 1.
    assert combined("multi-krum", values) == [1.25, 0.0]


def test_the_norm_bound_shortens_what_is_longer_than_the_median_norm() -> None:
    # Alphas repeat the first coordinate, so that it counts twice: norms are 3 root 2, 4 root 2 and 400 root 2.
    values = [[3.0, 0.0], [-4.0, 0.0], [400.0, 0.0]]
    assert combined("norm-bound", values, norm_bound=1.0) == pytest.approx([(3 - 4 + 4) / 3, 0.0])
    assert combined("norm-bound", values, norm_bound=2.0) == pytest.approx([(3 - 4 + 8) / 3, 0.0])
    assert combined("norm-bound", [[0.0, 0.0], [0.0, 0.0], [5.0, 0.0]]) == [0.0, 0.0]


def test_mixing_replaces_each_gradient_by_the_mean_of_its_nearest() -> None:
    # n - f = 2: each with its nearest one. 0 and 2 find each other, 5 finds 2, -100 finds 0.
    sites = torch.tensor([[value, 0.0] for value in (0.0, 2.0, 5.0, -100.0)])
    found = aggregation.nearest_neighbor_mixing(sites, 2)
    assert found.tolist() == [[1.0, 0.0], [1.0, 0.0], [3.5, 0.0], [-50.0, 0.0]]
    # Where none is false, all become the mean.
    assert aggregation.nearest_neighbor_mixing(sites, 0)[:, 0].tolist() == [-23.25] * 4


def test_mixing_gives_krum_what_honest_sites_have_in_common() -> None:
    """Sites of two kinds: the direction that divides them is larger than the one that they share."""
    kinds = [[1.0, 3.0], [1.0, -3.0]] * 6
    values = [*kinds, *[[-10.0, 30.0]] * 3]
    assert abs(combined("krum", values, 3)[1]) == 3.0
    assert combined("krum", values, 3, mixing=True) == pytest.approx([1.0, 0.0])


@pytest.mark.parametrize("aggregator", ["median", "trimmed-mean", "krum", "multi-krum", "norm-bound"])
def test_mixing_leaves_honest_sites_nearer_to_their_mean(aggregator: str) -> None:
    _, matrix = random_sites(23)
    honest = matrix[:18] + 1.0
    values = [*honest.tolist(), *(-10 * (matrix[18:] + 1.0)).tolist()]
    plain, nearest_neighbor_mixing = (
        np.array(combined(aggregator, values, 5, mixing=mixing)) for mixing in (False, True)
    )
    assert np.linalg.norm(nearest_neighbor_mixing - honest.mean(0)) < np.linalg.norm(plain - honest.mean(0))


def test_mixing_is_refused_where_the_server_sees_no_single_reply() -> None:
    with pytest.raises(ValueError, match="mixing"):
        Server(mixing=True)


# ---------------------------------------------------------------- against the library's functions


def random_sites(count: int) -> tuple[list[list[float]], np.ndarray]:
    values = np.random.default_rng(0).normal(size=(count, 6)).astype(np.float32)
    return values.tolist(), values.astype(np.float64)


def test_aggregates_are_those_of_flowers_functions() -> None:
    values, matrix = random_sites(15)
    assert combined("median", values) == pytest.approx(np.median(matrix, 0).tolist())
    assert combined("trimmed-mean", values, 3) == pytest.approx(trim_mean(matrix, 0.21).tolist())
    both = np.concatenate([matrix, matrix[:, :1]], 1)
    distances = compute_distances([ArrayRecord([row]) for row in both])
    scores = [np.sort(row)[1 : 15 - 3 - 2 + 1].sum() for row in distances]
    order = np.argsort(scores)
    assert combined("krum", values, 3) == pytest.approx(matrix[order[0]].tolist())
    assert combined("multi-krum", values, 3) == pytest.approx(matrix[order[:10]].mean(0).tolist())
    chosen = matrix[order[:9]]
    nearest = aggregate_n_closest_weights([np.median(chosen, 0)], [[row] for row in chosen], 3)[0]
    assert combined("bulyan", values, 3) == pytest.approx(nearest.tolist())


@pytest.mark.parametrize("aggregator", ROBUST)
def test_false_sites_cannot_drag_it_far(aggregator: str) -> None:
    _, matrix = random_sites(23)
    honest = (matrix + 3.0)[:18]
    false = -1e6 * (matrix + 3.0)[18:]
    found = combined(aggregator, [*honest.tolist(), *false.tolist()], 5)
    assert np.linalg.norm(np.array(found) - honest.mean(0)) < 0.6 * np.linalg.norm(honest.mean(0))
    mean = np.concatenate([honest, false]).mean(0)
    assert np.linalg.norm(mean) > 1e5


@pytest.mark.parametrize("mixing", [False, True])
@pytest.mark.parametrize("aggregator", ROBUST)
def test_the_order_of_nodes_changes_nothing(aggregator: str, mixing: bool) -> None:
    values, _ = random_sites(12)
    settings = Server(aggregator=aggregator, byzantine=2, mixing=mixing)
    whole = reply(values)
    parts = [
        TrainReply(
            {name: value[keep] for name, value in whole.gradient.items()},
            6.0,
            tuple(whole.names[place] for place in keep),
            np.zeros(6),
            np.ones(6, dtype=bool),
        )
        for keep in (list(range(1, 12, 2)), list(range(0, 12, 2)))
    ]
    one, other = aggregation.aggregate_replies([whole], settings), aggregation.aggregate_replies(parts, settings)
    assert one is not None
    assert other is not None
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_sites_that_are_not_finite_are_left_out() -> None:
    values = [[1.0, 1.0], [0.0, 0.0], [2.0, 3.0], [9.0, 9.0]]
    found = aggregation.aggregate_replies(
        [reply(values, [True, False, True, True])], Server(aggregator="median", byzantine=1)
    )
    assert found is not None
    assert found["theta"].tolist() == [2.0, 3.0]


# ---------------------------------------------------------------- too few


@pytest.mark.parametrize(
    ("aggregator", "sites", "words"),
    [
        ("median", 4, "2f + 1 = 5"),
        ("krum", 6, "2f + 3 = 7"),
        ("multi-krum", 6, "2f + 3 = 7"),
        ("bulyan", 10, "4f + 3 = 11"),
    ],
)
def test_too_few_sites_are_refused_at_the_start_in_one_line(aggregator: str, sites: int, words: str) -> None:
    settings = Server(aggregator=aggregator, byzantine=2, sites_per_round=0)
    with pytest.raises(FedmetaError, match=r"withstand f = 2 \(byzantine = 2\)") as refused:
        aggregation.check(settings, sites)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    aggregation.check(settings, sites + 1)
    assert aggregation.aggregate_replies([reply([[1.0, 1.0]] * sites)], settings) is None


def test_a_cohort_counts_and_not_the_population() -> None:
    with pytest.raises(FedmetaError, match="a round has 6"):
        aggregation.check(Server(aggregator="krum", byzantine=2, sites_per_round=6), 100)


@pytest.mark.parametrize(
    ("share", "sites", "false"), [(0.2, 15, 3), (0.2, 16, 4), (0.07, 100, 7), (3, 16, 3), (0.0, 9, 0)]
)
def test_a_share_of_false_sites_is_rounded_up(share: float | int, sites: int, false: int) -> None:
    assert aggregation.num_byzantine(share, sites) == false


# ---------------------------------------------------------------- an own rule


def geometric_median(gradients: Tensor) -> Tensor:
    """Weiszfeld's iteration (RFA, Pillutla 2022)."""
    found = gradients.mean(0)
    for _ in range(200):
        weights = 1 / (gradients - found).norm(dim=1).clamp(min=1e-9)
        found = (weights[:, None] * gradients).sum(0) / weights.sum()
    return found


def of_another_shape(gradients: Tensor) -> Tensor:
    return gradients


def that_fails(gradients: Tensor) -> Tensor:
    raise KeyError("oops")


def test_an_own_rule_is_one_function() -> None:
    values = [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1e6, 0.5]]
    found = combined("tests.server.test_aggregation:geometric_median", values)
    assert np.abs(np.array(found)).max() < 2


@pytest.mark.parametrize(("name", "words"), [("of_another_shape", "returned"), ("that_fails", "failed"), ("no", "no")])
def test_an_own_rule_that_does_not_work_is_named(name: str, words: str) -> None:
    with pytest.raises(FedmetaError, match=rf"\[server\] aggregator .*{name}.*{words}") as refused:
        combined(f"tests.server.test_aggregation:{name}", [[1.0, 2.0], [3.0, 4.0]])
    assert "\n" not in str(refused.value)


# ---------------------------------------------------------------- in a round


@pytest.mark.parametrize("aggregator", ["median", "krum"])
def test_the_aggregate_does_not_hang_on_how_sites_are_dealt_to_nodes(tmp_path: Path, aggregator: str) -> None:
    found: list[dict[str, Tensor]] = []
    for nodes in (1, 3):
        grid = SeveralNodes(app, digits(tmp_path, f"server.aggregator={aggregator}"), nodes)
        gradient, metrics = train(grid, strategy_over(grid))
        assert metrics is not None
        found.append(gradient)
    assert all(torch.allclose(value, found[1][name], atol=1e-6) for name, value in found[0].items())
    assert any(value.any() for value in found[0].values())


def test_a_round_with_too_few_for_the_aggregator_changes_nothing(tmp_path: Path) -> None:
    grid = SeveralNodes(app, digits(tmp_path, "server.aggregator=krum", "server.byzantine=2"), 3)
    strategy = strategy_over(grid)
    assert train(grid, strategy)[1] is not None
    grid.faults = {NODE_IDS[0]: breaks}
    gradient, metrics = train(grid, strategy)
    assert metrics is None
    assert not any(value.any() for value in gradient.values())
