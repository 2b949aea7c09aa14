"""Two tiers of one solver: cheap steps first, costly ones where those stall. Hartree-Fock, by PySCF (Sun et al. 2020).

A molecule's orbitals C solve F(C) C = S C e, where the Fock matrix F depends on C itself. Building F is what costs.

- First tier: build F, diagonalize, repeat (Roothaan 1951), bare ("plain") or with the extrapolation of Pulay ("diis",
  1982). One build a step; fast near a solution, and without end where it oscillates.
- Second tier: augmented-Hessian Newton steps on the energy (Sun 2016). Several builds a step, and they converge.

The rule when to switch: after build t, let g_t be the norm of the energy's gradient by orbital rotations. Switch where
`window` builds did not cut the smallest norm to `share` of what it was before them:

    min(g_{t-window+1}, ..., g_t) > share * min(g_1, ..., g_{t-window})

Just-in-time compilers have the same problem: when is code worth the optimizing tier? A site is a molecule, at two
geometries. What is learned is the number of builds that each rule is expected to take, by least squares; the rule of
the smallest number is used. Inner problem: mix what the rules take at the molecule's own first geometry into what the
federation expects (a gradient step on the squared error). Outer problem: those expectations for all molecules. A run
that does not converge counts as `FAILURE` builds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fedmeta
from fedmeta.errors import FedmetaError
from fedmeta.problems.problem import Parameters

try:
    from pyscf import gto, lib
    from pyscf import scf as hartree_fock
except ImportError as error:
    raise FedmetaError('experiments/gallery/scf needs pyscf: pip install "fedmeta[gallery]"') from error

LONGEST, FAILURE, TOLERANCE = 50, 100, 3e-5
"""Most builds of the first tier, builds that a failure counts as, and the gradient's norm at a solution."""

SCALES = (0.98, 1.02)
"""What the positions below are multiplied by, for the geometry to adapt on and the one to score by."""

MOLECULES = {
    "BeO": ("Be 0 0 0; O 0 0 1.33", 0),
    "C2": ("C 0 0 0; C 0 0 1.24", 0),
    "CN": ("C 0 0 0; N 0 0 1.17", 1),
    "CO": ("C 0 0 0; O 0 0 1.13", 0),
    "Cr2": ("Cr 0 0 0; Cr 0 0 1.68", 0),
    "F2": ("F 0 0 0; F 0 0 1.41", 0),
    "F2-stretched": ("F 0 0 0; F 0 0 2.5", 0),
    "FeO": ("Fe 0 0 0; O 0 0 1.62", 4),
    "H2O": ("O 0 0 0; H 0 .76 .59; H 0 -.76 .59", 0),
    "HF": ("H 0 0 0; F 0 0 .92", 0),
    "LiF-stretched": ("Li 0 0 0; F 0 0 3", 0),
    "N2": ("N 0 0 0; N 0 0 1.1", 0),
    "N2-stretched": ("N 0 0 0; N 0 0 2.2", 0),
    "NH3": ("N 0 0 .12; H 0 .94 -.27; H .81 -.47 -.27; H -.81 -.47 -.27", 0),
    "NO2": ("N 0 0 0; O 0 1.09 .47; O 0 -1.09 .47", 1),
    "O2": ("O 0 0 0; O 0 0 1.21", 2),
    "O3": ("O 0 0 0; O 0 1.09 .67; O 0 -1.09 .67", 0),
    "ScO": ("Sc 0 0 0; O 0 0 1.67", 1),
    "TiO": ("Ti 0 0 0; O 0 0 1.62", 2),
    "VO": ("V 0 0 0; O 0 0 1.59", 3),
}
"""Positions of nuclei (angstrom) near equilibrium or stretched, and the number of unpaired electrons."""


@dataclass(frozen=True)
class Rule:
    """When to leave the first tier: after `window` builds that did not cut the gradient to `share`, or at its end."""

    window: int
    share: float

    def switch(self, norms: Sequence[float]) -> int | None:
        """Returns after how many steps it leaves, given the gradient's norm after each; None where none is needed."""
        for t in range(self.window + 1, len(norms) + (norms[-1] >= TOLERANCE)):
            if min(norms[t - self.window : t]) > self.share * min(norms[: t - self.window]):
                return t
        return len(norms) if norms[-1] >= TOLERANCE else None


RULES: dict[str, Callable[[Sequence[float]], int | None]] = {
    "second order at once": lambda norms: 1,
    **{f"{share} in {window}": Rule(window, share).switch for window in (1, 2, 4, 8) for share in (0.25, 0.5, 0.9)},
    "never second order": lambda norms: None,
}
"""What is chosen from, as (share in window)."""


@dataclass(frozen=True)
class Outcome:
    """One run: Fock builds until its end, whether it converged, and its energy (hartree)."""

    builds: int
    converged: bool
    energy: float


class TooLongError(Exception):
    """A run has taken `FAILURE` builds."""


class Calculation:
    """One molecule: the path of the first tier, and what the second makes of any point of that.

    Args:
        atoms: Elements and positions (angstrom).
        unpaired: How many electrons are unpaired.
        first: "plain" or "diis".
        basis: The basis set.
    """

    def __init__(self, atoms: Any, unpaired: int, first: str, basis: str = "3-21g") -> None:
        lib.num_threads(1)
        self.molecule = gto.M(atom=atoms, basis=basis, spin=unpaired, verbose=0)
        self.first, self._known = first, dict[int, Outcome]()

    def method(self) -> Any:
        """Returns restricted Hartree-Fock, or unrestricted where electrons are unpaired."""
        return (hartree_fock.UHF if self.molecule.spin else hartree_fock.RHF)(self.molecule)

    @cached_property
    def path(self) -> tuple[list[float], list[tuple[Any, Any]], float]:
        """The gradient's norm after each step, the orbitals and occupations there, and the energy at the end.

        Step t builds F from the orbitals before it; the first from a superposition of atoms, so that t steps are t
        builds, and the norm of the last one's orbitals takes one more.
        """
        method, norms, orbitals = self.method(), list[float](), list[tuple[Any, Any]]()
        core, overlap = method.get_hcore(), method.get_ovlp()
        extrapolation = hartree_fock.diis.CDIIS(method) if self.first == "diis" else None
        density = method.get_init_guess(self.molecule, "minao")
        for step in range(LONGEST + 1):
            potential = method.get_veff(self.molecule, density)
            if orbitals:
                fock = method.get_fock(core, overlap, potential, density)
                norms.append(float(np.linalg.norm(method.get_grad(*orbitals[-1], fock))))
                if norms[-1] < TOLERANCE or step == LONGEST:
                    break
            fock = method.get_fock(core, overlap, potential, density, step, extrapolation)
            levels, own = method.eig(fock, overlap)
            orbitals.append((own, method.get_occ(levels, own)))
            density = method.make_rdm1(*orbitals[-1])
        return norms, orbitals, float(method.energy_tot(density, core, potential))

    def second_order(self, start: int) -> Outcome:
        """Returns what Newton steps come to after so many steps of the first tier (kept)."""
        if start not in self._known:
            newton, count = self.method().newton(), [start]
            usual = newton.get_jk

            def counted(*arguments: Any, **named: Any) -> Any:
                count[0] += 1
                if count[0] >= FAILURE:
                    raise TooLongError
                return usual(*arguments, **named)

            newton.get_jk = counted
            try:
                energy = newton.kernel(*self.path[1][start - 1])
                self._known[start] = Outcome(count[0], bool(newton.converged), float(energy))
            except TooLongError:
                self._known[start] = Outcome(FAILURE, False, np.nan)
        return self._known[start]

    def run(self, rule: str) -> Outcome:
        """Returns what a rule comes to."""
        norms, _, energy = self.path
        switch = RULES[rule](norms)
        return Outcome(len(norms) + 1, norms[-1] < TOLERANCE, energy) if switch is None else self.second_order(switch)


@cache
def outcomes(site: str, first: str, scale: float) -> dict[str, Tensor]:
    """Returns builds, failures (0 or 1) and energies above the lowest (hartree, NaN for none) of all rules [rules]."""
    atoms, unpaired = MOLECULES[site]
    words = [atom.split() for atom in atoms.split(";")]
    calculation = Calculation([(e, [scale * float(x) for x in xyz]) for e, *xyz in words], unpaired, first)
    found = [calculation.run(rule) for rule in RULES]
    energies = torch.tensor([own.energy if own.converged else np.nan for own in found], dtype=torch.float64)
    lowest = energies[~energies.isnan()].min() if bool((~energies.isnan()).any()) else 0.0
    return {
        "builds": torch.tensor([float(own.builds if own.converged else FAILURE) for own in found]),
        "failed": torch.tensor([float(not own.converged) for own in found]),
        "energy": (energies - lowest).float(),
    }


class TwoTiers(fedmeta.Problem, fedmeta.TaskSource):
    """When to switch to second order, for molecules.

    Args:
        first: The first tier: "plain" or "diis".
    """

    metrics = (
        fedmeta.Metric("builds", higher_is_better=False, unit=f"Fock builds; a failure counts as {FAILURE}"),
        fedmeta.Metric("failed", higher_is_better=False, unit="share of runs"),
        fedmeta.Metric(
            "above_lowest", higher_is_better=False, unit="hartree above the lowest energy that a rule found"
        ),
    )

    def __init__(self, first: str = "diis") -> None:
        if first not in ("plain", "diis"):
            raise FedmetaError(f'problem.first = "{first}": it is "plain" or "diis"')
        self.first = first

    def init(self, seed: int) -> Parameters:
        """Returns that nothing is expected: the first of the rules, second order at once."""
        return {"expected": torch.zeros(len(RULES))}

    def inner(self, parameters: Parameters, data: Any) -> Tensor:
        """Returns half the squared error of expected builds."""
        return (parameters["expected"] - data["builds"]).square().sum() / 2

    def evaluate(self, parameters: Parameters, data: Any) -> dict[str, Tensor]:
        """Returns what the chosen rule takes, whether it failed, and how its energy compares."""
        rule = parameters["expected"].argmin()
        figures = (data["builds"][rule], data["failed"][rule], data["energy"][rule])
        return {metric.name: value for metric, value in zip(self.metrics, figures, strict=True)}

    def classical(self, parameters: Parameters, data: Any) -> tuple[Parameters, int]:
        """Returns the first tier alone."""
        return {"expected": -torch.eye(len(RULES))[-1]}, 1

    def optimum(self, parameters: Parameters, data: Any) -> Parameters:
        """Returns the builds of each rule themselves."""
        return {"expected": data["builds"]}

    def sites(self) -> list[str]:
        """Returns the molecules' names."""
        return sorted(MOLECULES)

    def task(self, site: str, purpose: str, round: int, seed: int) -> fedmeta.Task:
        """Returns what every rule takes at the molecule's two geometries."""
        return fedmeta.Task(*(outcomes(site, self.first, scale) for scale in SCALES))
