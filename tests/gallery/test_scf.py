"""Two tiers of Hartree-Fock: PySCF's own results, the rule on made-up norms, and the learned rule at new molecules."""

import pytest
import torch

pytest.importorskip("pyscf", reason="PySCF is not installed (fedmeta[gallery])")

from pyscf import gto
from pyscf import scf as hartree_fock

from experiments.gallery import measure
from experiments.gallery.scf import scf
from fedmeta.errors import FedmetaError


def calculation(name, first):
    return scf.Calculation(*scf.MOLECULES[name], first)


@pytest.mark.slow
def test_energies_are_pyscfs_own():
    for name, kind in (("H2O", hartree_fock.RHF), ("NO2", hartree_fock.UHF)):
        atoms, unpaired = scf.MOLECULES[name]
        method = kind(gto.M(atom=atoms, basis="3-21g", spin=unpaired, verbose=0))
        energy = method.kernel()
        for first, rule in (("plain", "second order at once"), ("diis", "never second order"), ("diis", "0.5 in 2")):
            own = calculation(name, first).run(rule)
            assert own.converged
            assert own.energy == pytest.approx(energy, abs=1e-6)


@pytest.mark.slow
def test_chromium_fails_by_plain_iteration_and_converges_by_the_others_to_the_same_energy():
    """Cr2 at 1.68 A: some 17 builds by DIIS, some 38 by Newton's method."""
    plain, diis = calculation("Cr2", "plain"), calculation("Cr2", "diis")
    assert not plain.run("never second order").converged
    by_diis, by_newton = diis.run("never second order"), plain.run("second order at once")
    assert by_diis.converged
    assert by_newton.converged
    assert by_diis.energy == pytest.approx(by_newton.energy, abs=1e-6)
    assert 10 <= by_diis.builds <= 20
    assert 30 <= by_newton.builds <= 45


@pytest.mark.slow
def test_nitrogen_dioxide_converges_by_all():
    for first in ("plain", "diis"):
        found = [
            calculation("NO2", first).run(rule) for rule in ("never second order", "0.5 in 4", "second order at once")
        ]
        assert all(own.converged for own in found)
        assert max(own.energy for own in found) - min(own.energy for own in found) < 1e-6


@pytest.mark.parametrize(
    ("norms", "switch"),
    [
        ([1.0, 0.4, 0.16, 0.06, 0.02, 1e-6], None),
        ([1.0, 0.4, 0.4, 0.4, 0.4], 4),
        ([1.0, 2.0, 3.0, 4.0], 3),
        ([1.0, 0.3, 0.3, 1e-6], None),
        ([1.0, 0.4, 0.16], 3),
    ],
    ids=["fast", "stalls", "diverges", "done where it would switch", "not done at the end"],
)
def test_the_rule_switches_where_the_gradient_stalls(norms, switch):
    assert scf.Rule(2, 0.5).switch(norms) == switch


@pytest.mark.slow
def test_switching_on_stall_never_fails_where_plain_iteration_does_and_saves_builds_where_it_is_slow():
    for name in ("BeO", "CO", "O3"):
        own = calculation(name, "plain")
        assert not own.run("never second order").converged
        assert own.run("0.5 in 4").converged
    slow = calculation("NO2", "plain")
    assert slow.run("0.5 in 2").builds < slow.run("never second order").builds


def test_a_run_is_cut_where_it_has_taken_too_many_builds(monkeypatch):
    monkeypatch.setattr(scf, "FAILURE", 5)
    own = calculation("H2O", "plain").run("second order at once")
    assert (own.builds, own.converged) == (5, False)


def test_an_unknown_first_tier_is_refused():
    with pytest.raises(FedmetaError, match=r'problem\.first = "newton"'):
        scf.TwoTiers("newton")


@pytest.mark.slow
def test_expected_builds_are_the_mean_of_training_molecules_and_choose_the_rule(monkeypatch):
    few = {name: scf.MOLECULES[name] for name in ("CO", "F2", "H2O", "HF", "N2", "NO2", "O3")}
    monkeypatch.setattr(scf, "MOLECULES", few)
    result = measure.run("scf", "problem.first=plain", "data.new_sites=2")
    problem, new = scf.TwoTiers("plain"), measure.new_sites(result)
    own = [problem.task(site, "train", 1, 0) for site in measure.training_sites(result)]
    tables = torch.stack([(task.support["builds"] + task.query["builds"]) / 2 for task in own])
    assert len(new) == 2
    expected = result.meta_state["theta.expected"]
    assert torch.allclose(expected, tables.mean(0), atol=0.01)
    for site in new:
        task = problem.task(site, "test", 0, 0)
        found = problem.evaluate({"expected": expected}, task.query)
        assert float(found["builds"]) == float(task.query["builds"][expected.argmin()])
        best = problem.evaluate(problem.optimum({}, task.query), task.query)["builds"]
        assert best <= found["builds"]
