"""What all engines keep to: the same sums, chunks, masks, and sites that are not finite; and which one is chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmeta import engines, models
from fedmeta.engines import lowrank, selection
from fedmeta.engines.microbatch import chunk_sites, chunks
from fedmeta.engines.selection import ENGINES
from fedmeta.errors import FedmetaError
from fedmeta.learners import Learner, build
from fedmeta.learners.gradient_kind import gradient_kind
from fedmeta.learners.learner import MetaState, Metrics
from fedmeta.learners.maml import Maml
from fedmeta.models import Parameters
from fedmeta.task import Batch, Rows, Task
from tests.engines.cases import CLASSES, FusedAttention, Transformer, disagreement, distance, state, tasks

RAGGED = [(4, 5), (1, 3), (6, 2), (3, 3)]


def mlp(name: str = "maml", **settings: object) -> Learner:
    return build(name, models.build("mlp", (20,), CLASSES, hidden=(16,), activation="tanh"), inner_steps=2, **settings)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=4),
    name=st.sampled_from(["maml", "fomaml", "meta-sgd", "fedavg", "anil"]),
)
def test_vmap_is_the_loop(sizes: list[tuple[int, int]], name: str) -> None:
    assert disagreement(mlp(name), "vmap", tasks(sizes, (20,))) < 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_chunks_change_nothing(engine: str) -> None:
    learner, batch = mlp(), tasks(RAGGED, (20,))
    own = state(learner)
    whole = engines.meta_gradients(learner, own, batch, engine, weights=[1, 2, 3, 4])
    for chunk, budget in ((1, engines.BUDGET), (3, engines.BUDGET), (None, 1)):
        parts = engines.meta_gradients(learner, own, batch, engine, weights=[1, 2, 3, 4], chunk=chunk, budget=budget)
        assert distance(parts[0], whole[0]) < 1e-12
        assert parts[1] == whole[1] == 10
        assert distance(parts[2], whole[2]) < 1e-12
        scores = engines.evaluate(learner, own, batch, engine, chunk=chunk, budget=budget)
        assert torch.allclose(scores["loss"], engines.evaluate(learner, own, batch, engine)["loss"])


def test_a_weight_that_fills_the_cache_is_read_once_for_all_sites_of_the_budget() -> None:
    sizes = {}
    for dense in (16, 1024):
        model = models.build("cnn", (16, 16), CLASSES, channels=(16, 32), kernel=3, dense=dense)
        learner, batch = build("maml", model, inner_steps=1), tasks([(40, 40)] * 4, (16, 16), torch.float32)
        sizes[dense] = chunk_sites(learner, learner.init(0), batch, "lowrank", engines.BUDGET)
    assert sizes[16] == 1
    assert sizes[1024] >= 4


def test_a_sum_of_parts_can_stay_as_it_was_added_up() -> None:
    learner, batch = mlp(), tasks(RAGGED, (20,), dtype=torch.float32)
    own = state(learner, dtype=torch.float32)
    for chunk, expected in ((1, torch.float64), (None, torch.float32)):
        kept = engines.meta_gradients(learner, own, batch, "lowrank", chunk=chunk, rounded=False)[0]
        rounded = engines.meta_gradients(learner, own, batch, "lowrank", chunk=chunk)[0]
        assert {value.dtype for value in kept.values()} == {expected}
        assert all(torch.equal(value.float(), rounded[name]) for name, value in kept.items())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["maml", "fomaml", "reptile", "local"])
def test_sites_that_are_not_finite_have_no_share(name: str, engine: str) -> None:
    learner = mlp(name)
    batch, good = tasks(RAGGED, (20,)), tasks([RAGGED[0], RAGGED[2]], (20,))
    batch.support[0][1, 0, 0] = torch.inf
    batch.query[0][3, 0, 0] = torch.nan
    kept = [0, 2]
    own = state(learner)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    gradient, weight, figures = engines.meta_gradients(learner, own, batch, engine, weights=weights)
    good = Batch(*(tuple(tensor[kept] for tensor in rows) for rows in batch))
    expected, _, _ = engines.meta_gradients(learner, own, good, "loop", weights=weights[kept])
    assert figures["finite"].tolist() == [1, 0, 1, 0]
    assert weight == 4
    assert distance(gradient, expected) < 1e-10
    assert all(value.isfinite().all() for value in gradient.values())


class Root(nn.Module):
    """Its loss is finite at zero, and the derivative of that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x.sum(1, keepdim=True) * self.layer(torch.zeros_like(x)).abs().sqrt()


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_that_are_not_finite_have_no_share(engine: str) -> None:
    learner = build("maml", Root(), inner_steps=1)
    batch = tasks(RAGGED, (20,))
    own = state(learner)
    own["theta.layer.bias"] = torch.zeros(CLASSES, dtype=torch.float64)
    batch.support[0][[0, 1, 3]] = 0
    batch.query[0][[0, 1, 3]] = 0
    _, weight, figures = engines.meta_gradients(learner, own, batch, engine)
    assert (
        weight
        == float(figures["finite"].sum())
        == float(engines.meta_gradients(learner, own, batch, "loop")[2]["finite"].sum())
    )


class Stock(nn.Module):
    """Torch's own encoder layer, whose functions take parameters as a list."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.tokens(x)).mean(1))


class Custom(nn.Module):
    """A model around one function of a layer and the input."""

    def __init__(self, function: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(20, CLASSES)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer, x)


class Hidden(torch.autograd.Function):
    """A product that no hook sees."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.T

    @staticmethod
    def setup_context(context: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], _: Tensor) -> None:
        context.save_for_backward(*inputs)

    @staticmethod
    def backward(context: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = context.saved_tensors
        return gradient @ weight, gradient.T @ x


MISFITS = {
    "weight in a plain product": Custom(lambda layer, x: x @ layer.weight.T + layer.bias),
    "weight turned into another": Custom(lambda layer, x: nn.functional.linear(x, layer.weight.tanh(), layer.bias)),
    "rows that mix": Custom(lambda layer, x: layer(x - x.mean(0))),
    "rows that mix later": Custom(lambda layer, x: layer(x).softmax(0)),
    "a path that depends on values": Custom(lambda layer, x: layer(x) if bool(x.sum() > 0) else layer(-x)),
    "a hidden use beside a seen one": Custom(lambda layer, x: layer(x) + Hidden.apply(x, layer.weight)),
    "statistics of the batch as attention": Custom(lambda layer, x: (x @ x.T).softmax(1) @ layer(x)),
}


MIXED = (
    "rows that mix",
    "rows that mix later",
    "a path that depends on values",
    "statistics of the batch as attention",
)


@pytest.mark.parametrize("case", [name for name in MISFITS if name not in MIXED])
def test_misfits_take_another_engine(case: str) -> None:
    learner = build("maml", MISFITS[case], inner_steps=2)
    batch = tasks([(4, 5), (2, 3), (6, 2)], (20,))
    own = state(learner)
    assert lowrank.fits(learner, batch, own) is not None
    assert engines.choose_engine(learner, batch, own) != "lowrank"
    expected, _, _ = engines.meta_gradients(learner, own, batch, "loop")
    assert distance(engines.meta_gradients(learner, own, batch, "lowrank")[0], expected) < 1e-10


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize("case", MIXED)
def test_rows_that_mix_are_refused_by_every_engine(case: str, engine: str) -> None:
    learner, batch = build("maml", MISFITS[case], inner_steps=2), tasks(RAGGED, (20,))
    for ask in (engines.meta_gradients, engines.evaluate):
        with pytest.raises(FedmetaError, match="a row's outputs depend on the other rows"):
            ask(learner, state(learner), batch, engine)
    assert lowrank.fits(learner, batch) is not None


class PathOfARow(nn.Module):
    """A row's path depends on its own values: right, and for no batched form."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        rows = [self.layer(row) if bool(row.sum() > 0) else self.layer(row).tanh() for row in x]
        return torch.stack(rows) if rows else self.layer(x)


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_a_path_that_depends_on_a_rows_own_values_falls_back_to_the_loop(engine: str) -> None:
    learner, batch = build("maml", PathOfARow(), inner_steps=2), tasks(RAGGED, (20,))
    own = state(learner)
    assert "looks at values" in str(lowrank.fits(learner, batch, own))
    assert engines.choose_engine(learner, batch, own) == "loop"
    expected = ENGINES["loop"].meta_gradients(learner, own, batch, torch.ones(4)).total
    assert distance(engines.meta_gradients(learner, own, batch, engine)[0], expected) < 1e-10
    found = engines.evaluate(learner, own, batch, engine)["loss"]
    assert torch.allclose(found, ENGINES["loop"].evaluate(learner, own, batch, 2)["loss"])


@pytest.mark.slow
def test_the_stock_encoder_layer_takes_another_engine() -> None:
    learner = build("maml", Stock(), inner_steps=2)
    batch = tasks(RAGGED, (), tokens=True)
    own = state(learner)
    assert "multi_head_attention" in str(lowrank.fits(learner, batch, own))
    expected, _, _ = engines.meta_gradients(learner, own, batch, "loop")
    for engine in ("lowrank", "auto"):
        assert distance(engines.meta_gradients(learner, own, batch, engine)[0], expected) < 1e-10


@dataclass(frozen=True)
class OtherLoss(Maml):
    """Maml with an own loss, which the low-rank form does not know."""

    def inner(self, parameters: Parameters, data: Rows) -> Tensor:
        return 2 * super().inner(parameters, data)


@dataclass(frozen=True)
class OtherGradient(Maml):
    """Maml that sends something else."""

    def meta_gradient(self, meta_state: MetaState, task: Task) -> tuple[dict[str, Tensor], Metrics]:
        gradient, metrics = super().meta_gradient(meta_state, task)
        return {name: -value for name, value in gradient.items()}, metrics


@dataclass(frozen=True)
class Marked(OtherLoss):
    """A mark does not hold where the loss is another."""

    @gradient_kind("exact")
    def meta_gradient(self, meta_state: MetaState, task: Task) -> tuple[dict[str, Tensor], Metrics]:
        return super().meta_gradient(meta_state, task)


@pytest.mark.parametrize("kind", [OtherLoss, OtherGradient, Marked])
def test_learners_of_their_own_take_another_engine(kind: type[Learner]) -> None:
    learner = kind(nn.Linear(20, CLASSES), inner_steps=2)
    batch = tasks(RAGGED, (20,))
    own = state(learner)
    assert learner.estimator == "custom"
    assert lowrank.fits(learner, batch, own) is not None
    expected, _, _ = engines.meta_gradients(learner, own, batch, "loop")
    assert distance(engines.meta_gradients(learner, own, batch, "lowrank")[0], expected) < 1e-10


def test_rates_per_element_take_another_engine() -> None:
    assert "each of its elements" in str(lowrank.fits(mlp("meta-sgd"), tasks(RAGGED, (20,))))


@pytest.mark.slow
def test_fused_attention() -> None:
    learner = build("maml", Transformer(attention=FusedAttention), inner_steps=2)
    batch = tasks(RAGGED, (), tokens=True)
    own = state(learner)
    expected, _, _ = engines.meta_gradients(learner, own, batch, "loop")
    assert distance(engines.meta_gradients(learner, own, batch, "lowrank")[0], expected) < 1e-10


@pytest.mark.slow
def test_fedmetas_cnn() -> None:
    learner = build("maml", models.build("cnn", (28, 28), 62), inner_steps=1)
    batch = tasks([(3, 2), (2, 3)], (28, 28), torch.float32)
    forms = lowrank.plan_of(learner, batch, state(learner, torch.float32))
    assert forms.lowrank == {"8.weight", "10.weight"}
    assert disagreement(learner, "lowrank", batch, torch.float32) < 1e-5


def test_the_budget_bounds_what_is_computed_together() -> None:
    learner, batch = mlp(), tasks(RAGGED * 5, (20,))
    own = state(learner)
    for engine in ("vmap", "lowrank"):
        sizes = [chunk_sites(learner, own, batch, engine, budget) for budget in (1, 10**6, 10**8)]
        assert sizes == sorted(sizes)
        assert sizes[0] == 1


@pytest.mark.slow
def test_short_sites_are_not_padded_to_long_ones() -> None:
    learner, sizes = mlp(), [(2, 2), (40, 40), (3, 2), (1, 1), (38, 30), (2, 3)]
    batch = tasks(sizes, (20,))
    own = state(learner)
    parts = list(chunks(batch, 4))
    assert sorted(torch.cat([sites for sites, _ in parts]).tolist()) == [0, 1, 2, 3, 4, 5]
    assert sum(part.support[0].shape[0] * part.support[0].shape[1] for _, part in parts) < 120
    expected = engines.meta_gradients(learner, own, batch, "loop", weights=range(1, 7))
    for engine in ENGINES:
        actual = engines.meta_gradients(learner, own, batch, engine, weights=range(1, 7), chunk=4)
        assert distance(actual[0], expected[0]) < 1e-10
        assert distance(actual[2], expected[2]) < 1e-10
        losses = engines.evaluate(learner, own, batch, engine)["loss"]
        assert torch.allclose(losses, engines.evaluate(learner, own, batch, "loop", chunk=6)["loss"])


def test_trial_names_an_engine_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = tasks(RAGGED, (20,))
    learner = mlp("meta-sgd")
    assert engines.trial(learner, state(learner), batch) == ("program", {})  # too small to be worth other bits
    monkeypatch.setattr(selection, "SMALL", 0)
    assert engines.trial(mlp(), state(mlp()), batch) == ("lowrank", {})
    chosen, figures = engines.trial(learner, state(learner), batch)
    assert chosen in figures
    assert set(figures) == {"loop", "vmap", "program"}


def test_an_unknown_engine_is_named_with_the_nearest() -> None:
    with pytest.raises(FedmetaError, match='no engine "lowrnk"; did you mean "lowrank"'):
        engines.meta_gradients(mlp(), state(mlp()), tasks(RAGGED, (20,)), "lowrnk")


@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
def test_no_sites_send_nothing(engine: str) -> None:
    learner = mlp()
    gradient, weight, figures = engines.meta_gradients(learner, state(learner), [], engine)
    assert weight == 0
    assert all(value.shape == gradient[name].shape for name, value in state(learner).items())
    assert not any(value.any() for value in gradient.values())
    assert [len(figures[name]) for name in ("query_loss", "finite")] == [0, 0]
    assert engines.evaluate(learner, state(learner), [], engine)["accuracy"].shape == (0, 3)


@pytest.mark.parametrize("weights", [[1.0], [1.0] * 5, [1.0, 1.0, -1.0, 1.0], [1.0, torch.nan, 1.0, 1.0]])
def test_weights_are_one_number_a_site(weights: list[float]) -> None:
    learner = mlp()
    with pytest.raises(FedmetaError, match="4 numbers of at least 0"):
        engines.meta_gradients(learner, state(learner), tasks(RAGGED, (20,)), weights=weights)


class Recurrent(nn.Module):
    """Torch's own LSTM, which vmap can differentiate and not run."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 6, batch_first=True)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.unflatten(1, (4, 5)))[0][:, -1])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_trial_chooses_an_engine_that_also_evaluates() -> None:
    learner = build("maml", Recurrent(), inner_steps=1)
    own = state(learner, torch.float32)
    batch = tasks(RAGGED, (20,), torch.float32)
    chosen, _ = engines.trial(learner, own, batch)
    assert engines.evaluate(learner, own, batch, chosen)["loss"].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_as_many_right_rows_are_the_same_accuracy(engine: str) -> None:
    learner = build("maml", nn.Linear(2, 2), inner_steps=0)
    own = {"theta.weight": torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), "theta.bias": torch.zeros(2)}
    for rows in range(1, 40):
        x = torch.ones(rows, 2)
        query = [(x, (torch.arange(rows) < right).long()) for right in range(rows + 1)]
        found = engines.evaluate(learner, own, [Task((x[:1], torch.zeros(1).long()), each) for each in query], engine)
        expected = 1 - torch.arange(rows + 1) / rows
        torch.testing.assert_close(found["accuracy"][:, 0], expected, rtol=0, atol=6e-8)
        shuffled = [(x, y[torch.randperm(rows, generator=torch.Generator().manual_seed(1))]) for x, y in query]
        again = engines.evaluate(learner, own, [Task(each, each) for each in shuffled], engine)
        assert torch.equal(again["accuracy"], found["accuracy"])
