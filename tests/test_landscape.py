"""Curvature by stochastic Lanczos quadrature, against a known density of states and against formed Hessians."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from scipy.special import ellipk
from torch import nn
from torch.func import hessian

import fedmeta
from fedmeta.cli.main import main
from fedmeta.landscape import agreement, landscape, spectrum
from fedmeta.learners import build
from tests.server.digits import digits

SIDE = 256
WIDTH = 0.08


def hopping(vector):
    """The square lattice with hopping -1 between neighbors: E(k) = -2 (cos kx + cos ky), with a saddle at E = 0."""
    grid = vector.reshape(SIDE, SIDE)
    return -sum(grid.roll(shift, axis) for shift in (1, -1) for axis in (0, 1)).reshape(-1)


@pytest.fixture(scope="module")
def lattice():
    return spectrum(hopping, SIDE * SIDE, steps=100, probes=24, seed=0)


def exact(energies):
    """The lattice's density of states, with a logarithmic singularity at 0 (Van Hove 1953)."""
    return ellipk(1 - (energies / 4) ** 2) / (2 * np.pi**2)


@pytest.mark.slow
def test_the_density_at_the_saddle_is_the_known_one(lattice):
    energies = np.linspace(-3.9999, 3.9999, 20000)
    for place in (0.0, 0.5, 1.0, 2.0):
        bell = np.exp(-0.5 * ((place - energies) / WIDTH) ** 2) / (WIDTH * math.sqrt(2 * math.pi))
        expected = np.trapezoid(exact(energies) * bell, energies)
        found = float(lattice.density(np.array([place]), WIDTH)[0])
        assert found == pytest.approx(expected, rel=0.01), place
    assert float(lattice.density(np.array([0.0]), WIDTH)[0]) == pytest.approx(0.3006, rel=0.01)


@pytest.mark.slow
def test_the_distribution_is_the_known_one(lattice):
    energies = np.linspace(-3.9999, 3.9999, 20000)
    shares = np.cumsum(exact(energies)) * (energies[1] - energies[0])
    for place in (-3, -2, -1, -0.5, 0, 0.5, 1, 2, 3):
        assert lattice.below(place) == pytest.approx(np.interp(place, energies, shares), abs=0.005), place
    assert lattice.weights.sum() == pytest.approx(1)
    assert lattice.largest == pytest.approx(4, abs=0.05)
    assert lattice.smallest == pytest.approx(-4, abs=0.05)


def tasks_of(count, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [
        fedmeta.Task(
            *((torch.randn(6, 3, generator=random), torch.randint(0, 2, (6,), generator=random)) for _ in range(2))
        )
        for _ in range(count)
    ]


@pytest.mark.quick("maml")
@pytest.mark.parametrize("name", ["maml", "fedavg-ft", "meta-sgd", "anil", "fedavg"])
def test_the_spectrum_is_that_of_the_hessian(name):
    learner = build(
        name, lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), inner_steps=2, inner_lr=0.3
    )
    state, tasks = learner.init(1), tasks_of(3)
    found = landscape(learner, state, tasks, steps=500, probes=1, seed=0)
    names = list(state)
    flat = torch.cat([state[key].double().reshape(-1) for key in names])
    sizes = [state[key].numel() for key in names]

    def objective(vector):
        parts = torch.split(vector, sizes)
        whole = {key: part.reshape(state[key].shape) for key, part in zip(names, parts, strict=True)}
        losses = []
        for support, query in tasks:
            rows = [(x.double(), y) for x, y in (support, query)]
            losses.append(learner.outer(learner.adapt(whole, rows[0]), rows[1]))
        return torch.stack(losses).mean()

    eigenvalues = torch.linalg.eigvalsh(hessian(objective)(flat)).numpy()
    assert found.spectrum.largest == pytest.approx(eigenvalues.max(), abs=1e-8)
    assert found.spectrum.smallest == pytest.approx(eigenvalues.min(), abs=1e-8)
    assert found.loss == pytest.approx(float(objective(flat)), abs=1e-12)
    assert found.parameters == len(flat)
    assert math.isnan(found.path_cosine) == (name == "fedavg")


def test_equal_sites_agree_and_opposite_ones_do_not():
    one = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    assert agreement(one) == pytest.approx((1.0, 5.0))
    assert agreement(torch.stack([one[0], -one[0]])) == pytest.approx((-1.0, -5.0))
    assert all(math.isnan(value) for value in agreement(one[:1]))


@pytest.mark.slow
def test_the_command_measures_a_run(tmp_path, monkeypatch, capsys):
    result = fedmeta.run(digits(tmp_path, "tracking.uri=none", "model.hidden=8", "server.rounds=2"))
    command = ["landscape", str(result.folder), "--sites", "3", "--steps", "8", "--probes", "2", "--json"]
    monkeypatch.setattr(sys, "argv", ["fedmeta", *command])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert ended.value.code == 0, printed.err
    found = json.loads(printed.out.splitlines()[-1])
    assert found["sites"] == 3
    assert found["largest_eigenvalue"] > 0
    assert found["smallest_eigenvalue"] <= found["largest_eigenvalue"]
    assert 0 <= found["negative_share"] <= 1
    assert (result.folder / "landscape" / "landscape.png").exists()
    assert json.loads((result.folder / "landscape" / "landscape.json").read_text()) == found
