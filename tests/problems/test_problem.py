"""Own problems: exact derivatives, every learner, refusals."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fedmeta
from fedmeta.errors import FedmetaError
from fedmeta.learners import LEARNERS, build, trained
from fedmeta.learners.check import check
from fedmeta.problems import Clipped, CrossEntropy, Momentum, Solver, Supervised
from fedmeta.progress import ignore_progress
from fedmeta.search.compare import compare

EXAMPLES = Path(__file__).parents[2] / "examples"


class Simplex(fedmeta.Problem):
    """Mixtures that explain a site's counts: weights on the simplex by softmax."""

    def init(self, seed):
        return {"weights": torch.randn(4, generator=torch.Generator().manual_seed(seed))}

    def constrain(self, parameters):
        return {"weights": parameters["weights"].softmax(-1)}

    def inner(self, parameters, data):
        return -(data * parameters["weights"].log()).mean()


class Shared(fedmeta.Problem):
    """A gain that all share, and a coefficient of a site's own."""

    shared = ("gain",)

    def init(self, seed):
        return {"gain": torch.tensor([0.7]), "own": torch.tensor([0.1, -0.2])}

    def inner(self, parameters, data):
        x, y = data[..., :2], data[..., 2]
        return ((parameters["gain"] * (x @ parameters["own"]).tanh() - y) ** 2).mean()


class Spectrum(fedmeta.Problem):
    """A filter whose output's spectrum is fitted: complex numbers and an FFT inside a real objective."""

    def init(self, seed):
        return {"taps": torch.linspace(0.1, 0.8, 4)}

    def inner(self, parameters, data):
        response = torch.fft.rfft(parameters["taps"], n=8) * torch.fft.rfft(data, dim=-1)
        return (response.abs() - 1).square().mean()


class SparseSolve(Solver):
    """u = K(theta)^-1 f by SciPy's sparse LU: outside of autograd."""

    kind = "implicit"

    def solve(self, problem, parameters, data, steps, rates):
        import scipy.sparse
        import scipy.sparse.linalg

        matrix = scipy.sparse.csc_matrix(problem.matrix(parameters).detach().double().numpy())
        found = scipy.sparse.linalg.splu(matrix).solve(data["force"].detach().double().numpy())
        solution = torch.from_numpy(found).to(data["force"].dtype)
        return [parameters, {**parameters, "u": solution}]


class Truss(fedmeta.Problem):
    """Springs in a row with shared stiffness: displacements solve K u = f."""

    shared = ("stiffness",)
    solver = SparseSolve()

    def init(self, seed):
        return {"stiffness": torch.tensor([0.2, -0.1, 0.4, 0.3]), "u": torch.zeros(4)}

    def matrix(self, parameters):
        k = parameters["stiffness"].exp()
        return torch.diag(k + torch.cat([k[1:], k.new_zeros(1)])) - torch.diag(k[1:], 1) - torch.diag(k[1:], -1)

    def inner(self, parameters, data):
        return 0.5 * parameters["u"] @ self.matrix(parameters) @ parameters["u"] - data["force"] @ parameters["u"]

    def outer(self, parameters, data):
        return (data["force"] * parameters["u"]).sum() + parameters["u"].square().sum()

    def residual(self, solution, parameters, data):
        return {"u": self.matrix(parameters) @ solution["u"] - data["force"]}


def tasks_of(shape, form=lambda draw: draw, count=3):
    random = torch.Generator().manual_seed(3)

    def draw():
        return form(torch.rand(*shape, generator=random, dtype=torch.float64) + 0.1)

    return [fedmeta.Task(draw(), draw()) for _ in range(count)]


CASES = {
    "simplex": (Simplex(), tasks_of((5, 4))),
    "shared": (Shared(), tasks_of((6, 3))),
    "fft": (Spectrum(), tasks_of((3, 8))),
    "implicit": (Truss(), tasks_of((4,), lambda draw: {"force": draw})),
}


def directional(learner, state, task, gradient):
    """Returns the relative error of a directional derivative against a central finite difference."""
    random = torch.Generator().manual_seed(9)
    direction = {
        name: torch.randn(value.shape, generator=random, dtype=torch.float64) for name, value in gradient.items()
    }

    def value(step):
        moved = {n: v + step * direction[n] if n in direction else v for n, v in state.items()}
        return float(learner.outer(learner.adapt(moved, task.support), task.query))

    along = float(sum((gradient[name] * d).sum() for name, d in direction.items()))
    return abs((value(1e-5) - value(-1e-5)) / 2e-5 - along) / abs(along)


@pytest.mark.parametrize("name", CASES)
def test_the_meta_gradient_of_maml_is_exact(name):
    problem, tasks = CASES[name]
    learner = build("maml", problem, inner_steps=3, inner_lr=0.05)
    state = {key: value.double() for key, value in learner.init(0).items()}
    gradient, figures = learner.meta_gradient(state, tasks[0])
    assert gradient.keys() == trained(state).keys()
    assert set(problem.shared) <= gradient.keys()
    assert directional(learner, state, tasks[0], gradient) < 1e-6
    assert figures["query_loss"].isfinite()
    assert any("agrees with a finite difference" in line for line in check(learner, tasks).passed)


@pytest.mark.parametrize("solver", [Momentum(), Clipped(0.1), fedmeta.problems.Adam(), fedmeta.problems.ascent])
def test_maml_is_exact_through_every_differentiable_solver(solver):
    _, tasks = CASES["shared"]
    own = type("Own", (Shared,), {"solver": solver})()
    learner = build("maml", own, inner_steps=3, inner_lr=0.05)
    state = {key: value.double() for key, value in learner.init(0).items()}
    gradient, _ = learner.meta_gradient(state, tasks[0])
    assert directional(learner, state, tasks[0], gradient) < 1e-6


def test_shared_parameters_are_learned_and_never_moved():
    problem, tasks = CASES["shared"]
    learner = build("maml", problem, inner_steps=3, inner_lr=0.05)
    state = learner.init(0)
    assert set(state) == {"gain", "theta.own"}
    assert torch.equal(learner.adapt(state, tasks[0].support.float())["gain"], state["gain"])
    total, weight, _ = fedmeta.meta_gradients(learner, state, [fedmeta.Task(*(p.float() for p in t)) for t in tasks])
    assert weight == 3
    assert total["gain"].abs() > 0


def test_an_exact_learner_refuses_a_black_box():
    problem = type("Own", (Shared,), {"solver": CrossEntropy()})()
    with pytest.raises(FedmetaError, match="a black box without derivatives"):
        build("maml", problem)
    assert build("reptile", problem).problem is problem


def test_a_complex_parameter_is_refused():
    class Complex(Shared):
        def init(self, seed):
            return {"gain": torch.tensor([1j]), "own": torch.zeros(2)}

    with pytest.raises(FedmetaError, match='parameter "gain" is complex; keep its real and imaginary parts'):
        build("maml", Complex()).init(0)


class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    generate_vmap_rule = True

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 0.9 * ctx.saved_tensors[0].cos()


class WrongDerivative(Shared):
    def inner(self, parameters, data):
        return (Wrong.apply(data[..., :2] @ parameters["own"]) - data[..., 2]).square().mean() + parameters[
            "gain"
        ].sum() ** 2


class Noisy(Shared):
    def inner(self, parameters, data):
        return super().inner(parameters, data) + torch.rand(())


class ChangesBuffer(Shared):
    calls = 0

    def inner(self, parameters, data):
        ChangesBuffer.calls += 1
        return super().inner(parameters, data) * (1 + 0.1 * ChangesBuffer.calls)


class MixesRows(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x - x.mean(0))


@pytest.mark.parametrize(
    ("problem", "shown"),
    [
        (WrongDerivative(), "differs from a finite difference"),
        (Noisy(), "has another value when it is asked twice"),
        (ChangesBuffer(), "has another value when it is asked twice"),
    ],
)
def test_check_refuses_what_an_exact_gradient_cannot_have(problem, shown):
    with pytest.raises(FedmetaError, match=shown):
        check(build("maml", problem, inner_steps=2, inner_lr=0.05), CASES["shared"][1])


def test_check_refuses_a_model_whose_rows_mix():
    rows = [fedmeta.Task(*((torch.rand(6, 3), torch.randint(0, 2, (6,))) for _ in range(2))) for _ in range(2)]
    with pytest.raises(FedmetaError, match="depend on the other rows"):
        check(build("maml", Supervised(MixesRows())), rows)


class Caches(Simplex):
    """Keeps what it computed of parameters for data that it has seen, under a key of the caller's choice."""

    def __init__(self, key):
        self.key, self.kept = key, {}

    def inner(self, parameters, data):
        key = self.key(data)
        if key not in self.kept:
            self.kept[key] = parameters["weights"].log()
        return -(data * self.kept[key]).mean()


class Fails(Simplex):
    """Computes what its derivative cannot be taken of."""

    def inner(self, parameters, data):
        return torch.tensor(float(super().inner(parameters, data)), dtype=data.dtype)


NOT_DERIVED = "kept from one call|differs from a finite difference|another value|sends zeros|failed: RuntimeError"


@pytest.mark.parametrize("name", ["maml", "fomaml", "reptile", "fedavg"])
@pytest.mark.parametrize("problem", [lambda: Caches(id), lambda: Caches(lambda data: ""), Fails])
def test_what_torch_cannot_derive_is_refused_in_one_line(problem, name):
    with pytest.raises(FedmetaError, match=NOT_DERIVED) as raised:
        check(build(name, problem(), inner_steps=2, inner_lr=0.05), CASES["simplex"][1])
    assert "\n" not in str(raised.value)
    assert "INTERNAL ASSERT" not in str(raised.value)


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES.parent))
    monkeypatch.chdir(tmp_path)

    def experiment(*settings: str) -> fedmeta.Experiment:
        usual = ["tracking.uri=none", "server.rounds=3", "evaluation.every=0"]
        return fedmeta.load_experiment(EXAMPLES / "own_problem.toml", [*usual, *settings])

    return experiment


UNFIT = {
    "fedbabu": "FedBabu sends zeros",  # one array has no body before its head
    "protonet": "has no model on rows",
}
"""Learners that need layers, and how a problem of one array is refused."""


@pytest.mark.slow
@pytest.mark.parametrize("name", UNFIT)
def test_learners_that_need_layers_refuse_a_problem_of_one_array(own, name):
    with pytest.raises(FedmetaError, match=UNFIT[name]):
        fedmeta.run(own(f"learner.name={name}"))


@pytest.mark.quick("maml", "reptile")
@pytest.mark.parametrize("name", [name for name in LEARNERS if name not in UNFIT])
def test_every_learner_solves_an_own_problem_scored_below_zero(own, name):
    summary = fedmeta.run(own(f"learner.name={name}")).summary
    assert summary["score"] == {"name": "coherence", "higher_is_better": True, "unit": "dB"}
    new = summary["new_sites"]
    assert new["n"] == 2
    assert new["global"]["mean"] < 0
    assert new["local_only"]["mean"] > new["global"]["mean"], "trained alone on the own objective, not on another"
    if name != "fedavg":
        assert new["personalized"]["mean"] > new["global"]["mean"]
        assert new["helped"] == 1.0
    assert json.dumps(summary)


def test_an_own_problem_resumes_to_the_same_bits(own):
    whole = fedmeta.run(own("server.rounds=4", "runtime.checkpoint_every=2"))

    def stop(progress):
        if progress.round_number == 2:
            raise KeyboardInterrupt

    part = own("server.rounds=4", "runtime.checkpoint_every=2", "tracking.folder=part")
    with pytest.raises(KeyboardInterrupt):
        fedmeta.run(part, report=stop)
    again = fedmeta.run(part, resume="auto")
    assert all(torch.equal(value, again.meta_state[name]) for name, value in whole.meta_state.items())


def test_frozen_parameters_and_buffers_are_seeded_and_travel():
    class Fourier(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("matrix", torch.randn(3, 8))
            self.head = nn.Linear(8, 2)
            self.fixed = nn.Linear(8, 8)
            self.fixed.requires_grad_(False)

        def forward(self, x):
            return self.head(self.fixed((x @ self.matrix).cos()))

    learners = [build("maml", Fourier, inner_steps=2, inner_lr=0.1) for _ in range(2)]
    one, other = (learner.init(5) for learner in learners)
    assert {"frozen.matrix", "frozen.fixed.weight", "frozen.fixed.bias"} < one.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    tasks = [fedmeta.Task(*((torch.rand(6, 3), torch.randint(0, 2, (6,))) for _ in range(2))) for _ in range(2)]
    results = [
        fedmeta.meta_gradients(learner, one, tasks, engine)[0]
        for learner in learners
        for engine in ("loop", "lowrank", "vmap")
    ]
    for found in results:
        assert found.keys() == trained(one).keys()
        assert all(torch.allclose(value, results[0][name], atol=1e-6) for name, value in found.items())
    assert isinstance(one["frozen.matrix"], Tensor)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["server.aggregator=median", "server.byzantine=1"],
        ["server.aggregator=krum", "server.byzantine=1", "server.sites_per_round=0"],
        ["privacy.clip_norm=1", "privacy.noise_multiplier=0.5"],
        ["evaluation.schedule=auto", "evaluation.validation_sites=2"],
        ["server.weighting=examples"],
        ["learner.name=meta-sgd", "server.optimizer=momentum"],
        ["model.dtype=float64"],
    ],
    ids=" ".join,
)
def test_what_works_for_rows_works_for_an_own_problem(own, settings):
    summary = fedmeta.run(own("server.rounds=3", *settings)).summary
    assert summary["failures"] == 0
    assert math.isfinite(summary["new_sites"]["personalized"]["mean"])


def test_step_selection_by_folds_of_rows_is_refused_by_name(own):
    with pytest.raises(FedmetaError, match=r"gate = true.*folds of rows"):
        fedmeta.run(own("server.rounds=1", "evaluation.gate=true"))


@pytest.mark.slow
def test_several_learners_are_ranked_by_the_own_score(own, tmp_path):
    found = compare(own("server.rounds=3"), ["fedavg-ft", "maml", "average"], 2, report=lambda *_: ignore_progress)
    assert found.score.name == "coherence"
    assert found.score.higher_is_better
    means = found.table["personalized"].to_numpy()
    assert (np.diff(means) <= 0).all()  # best first, of scores that are negative
    assert (means < 0).all()
