"""One's own mistake is one line, whichever engine was asked for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedmeta import Task, engines
from fedmeta.errors import FedmetaError
from fedmeta.learners import build
from fedmeta.learners.maml import Maml
from tests.engines.test_proof import net, tasks

ENGINES = ["auto", "loop", "vmap", "lowrank"]


@dataclass(frozen=True)
class Changed(Maml):
    """A learner whose message is changed by what a test plants."""

    change = staticmethod(lambda gradient, figures: (gradient, figures))

    def meta_gradient(self, meta_state, task):
        return self.change(*super().meta_gradient(meta_state, task))


def without_first(gradient):
    return dict(list(gradient.items())[1:])


LEARNERS = {
    "returns one value": (lambda g, f: g, r"must return \(gradient, figures\), two dictionaries, and not dict"),
    "lacks a key": (lambda g, f: (without_first(g), f), r"lacks theta\.0\.weight"),
    "has a key too many": (lambda g, f: ({**g, "more": torch.ones(2)}, f), "has more besides"),
    "another shape": (
        lambda g, f: ({k: v.sum() for k, v in g.items()}, f),
        r"theta\.0\.weight of shape \(\), and not \(5, 4\)",
    ),
    "no loss": (lambda g, f: (g, {}), 'figures hold no "query_loss"'),
    "a loss that is no number": (lambda g, f: (g, {"query_loss": torch.ones(2)}), "must be one number"),
    "raises": (lambda g, f: 1 / 0, "meta_gradient failed: ZeroDivisionError"),
}


@pytest.mark.parametrize("method", ["predict", "loss", "score", "trajectory"])
def test_a_method_that_training_would_pass_over_is_refused(method: str) -> None:
    own = type("Own", (Maml,), {method: lambda self, *rest: torch.zeros(())})
    inherited = type("Child", (own,), {})
    for kind in (own, inherited):
        with pytest.raises(FedmetaError, match=f"defines {method}, which training does not call: .*") as raised:
            kind(net)
        assert "\n" not in str(raised.value)


@pytest.mark.quick("*-loop")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", LEARNERS)
def test_a_learner_that_is_wrong(case: str, engine: str) -> None:
    change, message = LEARNERS[case]
    learner = type("Own", (Changed,), {"change": staticmethod(change)})(net)
    for _ in range(2):  # the second time as the first
        with pytest.raises(FedmetaError, match=message) as raised:
            engines.meta_gradients(learner, learner.init(0), tasks(), engine)
        assert "\n" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("figure", [float, lambda v: torch.tensor(v.item())])
def test_figures_as_plain_numbers_are_taken(figure, engine: str) -> None:
    change = staticmethod(lambda g, f: (g, {"query_loss": figure(f["query_loss"]), "more": 1.0}))
    learner = type("Own", (Changed,), {"change": change})(net)
    own = learner.init(0)
    found, _, figures = engines.meta_gradients(learner, own, tasks(), engine)
    expected, _, _ = engines.meta_gradients(build("maml", net), own, tasks(), "loop")
    assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in expected.items())
    assert figures["query_loss"].isfinite().all()


def test_a_learner_that_draws_random_numbers_is_refused() -> None:
    def rates(self, meta_state, step):
        return dict.fromkeys(self.problem.moved, 0.1 * float(torch.rand(())))

    learner = type("Own", (Maml,), {"rates": rates})(net)
    with pytest.raises(FedmetaError, match="draws from torch's random generator"):
        engines.meta_gradients(learner, learner.init(0), tasks())


def test_a_learned_rate_may_be_a_scalar() -> None:
    def init(self, seed):
        return {**Maml.init(self, seed), "alpha.all": torch.tensor(-2.0)}

    def rates(self, meta_state, step):
        return dict.fromkeys(self.problem.moved, meta_state["alpha.all"].exp())

    learner = type("Own", (Maml,), {"init": init, "rates": rates})(net)
    own = learner.init(0)
    sums = [engines.meta_gradients(learner, own, tasks(), engine)[0]["alpha.all"] for engine in ENGINES]
    assert all(each.shape == () and torch.allclose(each, sums[1], rtol=1e-4) for each in sums)


class Own(nn.Module):
    """A linear layer with something that a test does before or after."""

    def __init__(self, before=lambda x: x, after=lambda z: z, outputs=3) -> None:
        super().__init__()
        self.layer = nn.Linear(4, outputs)
        self.register_buffer("count", torch.zeros(()))
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.layer(self.before(x)))


draw = np.random.default_rng()


class Counting(Own):
    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x)


class Averaging(Own):
    def forward(self, x: Tensor) -> Tensor:
        self.count = 0.9 * self.count + 0.1 * x.mean()
        return super().forward(x)


def zeroed(x: Tensor) -> Tensor:
    x[:, 0] = 0
    return x


def trained_only(z: Tensor) -> Tensor:
    return 2 * z if torch.is_grad_enabled() else z


MODELS = {
    "numpy": (lambda: Own(after=lambda z: torch.from_numpy(z.numpy())), "numpy and .item.. leave torch"),
    "a tuple": (lambda: Own(after=lambda z: (z, z)), "returned tuple; it must return one tensor"),
    "a dictionary": (lambda: Own(after=lambda z: {"z": z}), "returned dict; it must return one tensor"),
    "one value for all rows": (lambda: Own(after=lambda z: z.mean(0)), "the first dimension must be the rows"),
    "another device": (lambda: Own(after=lambda z: z.to("nowhere")), "failed on rows of shape"),
    "batch statistics": (
        lambda: Own(before=lambda x: nn.functional.batch_norm(x, None, None, training=True)),
        "a row's outputs depend on the other rows",
    ),
    "attention over rows": (lambda: Own(after=lambda z: (z @ z.T).softmax(1) @ z), "outputs depend on the other rows"),
    "places in the batch": (lambda: Own(after=lambda z: z + torch.arange(len(z))[:, None]), "depend on the other rows"),
    "dropout": (lambda: Own(before=lambda x: nn.functional.dropout(x, 0.3)), "draws random numbers in forward"),
    "little dropout": (lambda: Own(before=lambda x: nn.functional.dropout(x, 1e-9)), "draws random numbers"),
    "noise of numpy": (lambda: Own(after=lambda z: z + draw.random()), "draws random numbers in forward"),
    "a buffer that counts": (Counting, 'changes "count" when it is run'),
    "a buffer that is assigned": (Averaging, 'assigns its buffer "count"'),
    "its input": (lambda: Own(before=zeroed), "writes into its input"),
    "another model in training": (lambda: Own(after=trained_only), "other outputs where it is differentiated"),
    "one logit": (lambda: Own(outputs=1), "one output for labels that are classes"),
    "too few outputs": (lambda: Own(outputs=2), "label 2 is beyond the model's 2 outputs"),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_is_wrong(case: str, engine: str) -> None:
    make, message = MODELS[case]
    learner = build("maml", make)
    own, given = learner.init(0), tasks()
    for ask in (engines.meta_gradients, engines.evaluate):
        with pytest.raises(FedmetaError, match=message) as raised:
            ask(learner, own, given, engine)
        assert "\n" not in str(raised.value)
    assert all(torch.equal(one, other) for one, other in zip(own.values(), learner.init(0).values(), strict=True))


@pytest.mark.parametrize("name", ["ditto", "fedrep"])
@pytest.mark.parametrize("case", ["batch statistics", "dropout", "too few outputs"])
def test_learners_with_a_personal_part_refuse_the_same(case: str, name: str) -> None:
    from fedmeta.engines.personal_state import evaluate_personal, stack_personal, train_personal
    from fedmeta.task import stack

    make, message = MODELS[case]
    learner, batch = build(name, make), stack(tasks())
    own = learner.init(0)
    kept = stack_personal(learner, own, [None] * 3)
    with pytest.raises(FedmetaError, match=message):
        train_personal(learner, own, batch, torch.ones(3), kept)
    with pytest.raises(FedmetaError, match=message):
        evaluate_personal(learner, own, batch, 1, kept)


class Cells(nn.Module):
    """A recurrent cell, which has no batched form."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(2, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unflatten(1, (-1, 2)).unbind(1):
            state = self.cell(step, state)
        return self.head(state[0])


@pytest.mark.quick("*-maml")
@pytest.mark.parametrize("name", ["maml", "ditto", "imaml"])
@pytest.mark.parametrize("engine", ENGINES)
def test_what_has_no_batched_form_falls_back_to_the_loop(engine: str, name: str) -> None:
    learners = [build(name, Cells, inner_steps=2) for _ in range(2)]
    own = learners[0].init(0)
    expected, _, _ = engines.meta_gradients(learners[0], own, tasks(), "loop")
    found, _, _ = engines.meta_gradients(learners[1], own, tasks(), engine)
    assert all(torch.allclose(found[key], value, atol=1e-5) for key, value in expected.items())


def test_a_layer_without_a_second_derivative_is_named() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.head = nn.EmbeddingBag(9, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.bag(x.clamp(0, 8).long()))

    learner = build("maml", Bag)
    with pytest.raises(FedmetaError, match="derivative for '_embedding_bag_backward' is not implemented"):
        engines.meta_gradients(learner, learner.init(0), tasks())


@pytest.mark.parametrize("what", ["parameter", "buffer"])
def test_complex_parameters_are_refused_before_their_type_changes(what: str) -> None:
    module = nn.Linear(4, 3)
    if what == "parameter":
        module.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.complex64))
    else:
        module.register_buffer("phase", torch.randn(3, dtype=torch.complex64))
    with pytest.raises(FedmetaError, match="is complex: keep its real and imaginary parts as two real ones"):
        build("maml", module)


def of(support=lambda t: t, query=lambda t: t):
    return [Task(support(t.support), query(t.query)) for t in tasks()]


TASKS = {
    "numpy": (of(query=lambda r: (r[0].numpy(), r[1])), "task 0: its query has x of type ndarray"),
    "no pair": ([tasks()[0].support[0]], "make it fedmeta.Task"),
    "no labels": (of(support=lambda r: r[0]), r"its support is Tensor: make it \(x, y\)"),
    "labels too few": (of(support=lambda r: (r[0], r[1][:-1])), "give each row one y"),
    "a column of classes": (of(support=lambda r: (r[0], r[1][:, None])), "all sites need rows of one form"),
    "columns of classes": (
        of(*[lambda r: (r[0], r[1][:, None])] * 2),
        r"labels of whole numbers are classes, one for each row",
    ),
    "two targets for three outputs": (of(*[lambda r: (r[0], r[0][:, :2])] * 2), "as many outputs for each row"),
    "one target for three outputs": (of(*[lambda r: (r[0], r[0][:, 0])] * 2), "as many outputs for each row"),
    "labels beyond, in support only": (of(support=lambda r: (r[0], r[1] + 3)), "task 0, support: label [345]"),
    "labels beyond, in query only": (of(query=lambda r: (r[0], r[1] + 3)), "task 0, query: label [345]"),
    "another width": ([tasks()[0], Task(*((torch.zeros(3, 5), torch.zeros(3).long()),) * 2)], "task 1: its support"),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", TASKS)
def test_tasks_that_do_not_fit(case: str, engine: str) -> None:
    given, message = TASKS[case]
    learner = build("maml", net)
    for ask in (engines.meta_gradients, engines.evaluate):
        with pytest.raises(FedmetaError, match=message):
            ask(learner, learner.init(0), given, engine)


@pytest.mark.parametrize("y", [lambda y: y.int(), lambda y: y.to(torch.uint8), lambda y: y == 1])
def test_labels_of_any_whole_type_are_classes(y) -> None:
    learner = build("maml", net)
    own = learner.init(0)
    found = engines.meta_gradients(learner, own, of(*[lambda r: (r[0], y(r[1]))] * 2))[0]
    expected = engines.meta_gradients(learner, own, of(*[lambda r: (r[0], y(r[1]).long())] * 2), "loop")[0]
    assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in expected.items())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("inner_lr", -1.0),
        ("inner_lr", 0.0),
        ("inner_lr", float("nan")),
        ("inner_lr", float("inf")),
        ("inner_lr", "0.1"),
        ("inner_lr", True),
        ("inner_steps", 2.5),
        ("inner_steps", "3"),
        ("inner_steps", -1),
        ("global_weight", None),
    ],
)
def test_settings_that_cannot_be_are_named(key: str, value: object) -> None:
    with pytest.raises(FedmetaError, match=rf"learner\.{key} = .*: it must be"):
        build("maml", net, **{key: value})


def test_a_module_that_is_not_found_reports_where_it_looked(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "half_there.py").write_text("import surely_not_installed\n")
    (tmp_path / "there.py").write_text("class Learner: ...\n")
    with pytest.raises(FedmetaError, match=f"no module not_there; looked in {tmp_path}.*PYTHONPATH"):
        build("not_there:Learner", net)
    with pytest.raises(FedmetaError, match="half_there needs the module surely_not_installed"):
        build("half_there:Learner", net)
    with pytest.raises(FedmetaError, match=r"there.py defines no Lerner; did you mean .Learner"):
        build("there:Lerner", net)
    with pytest.raises(FedmetaError, match="is not a subclass of fedmeta"):
        build("there:Learner", net)


def test_a_learner_without_a_method_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "bare_learner.py").write_text("from fedmeta.learners import Learner\nclass Bare(Learner): ...\n")
    with pytest.raises(FedmetaError, match="defines no meta_gradient, which a learner needs"):
        build("bare_learner:Bare", net)
