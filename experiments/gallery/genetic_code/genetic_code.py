"""How well the genetic code tolerates mistakes, and a search for a better one (Haig and Hurst 1991).

A codon is read or copied wrongly in one letter; the amino acid that results may differ much or little from the meant
one, measured by Woese's polar requirement. The error of a code is the mean squared difference over all single-letter
mistakes. A code assigns twenty amino acids to the twenty blocks of codons that the standard code has; stop codons stay.

A site is an organism with its own codon usage, which weighs its mistakes. The server searches for one code for all, by
the steepest of all 190 swaps of two amino acids: sites send the error of every swap, the server adds them up and takes
the best one; at a local optimum it starts from another random code and remembers the best. An organism alone would
swap by its own errors. Codon usage: the package python-codon-tables (Kazusa database).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import python_codon_tables
import torch
from numpy.typing import NDArray
from torch import Tensor

import fedmeta
from fedmeta.problems.problem import Parameters
from fedmeta.problems.solvers import Rates

Floats = NDArray[np.float64]

POLAR = {
    "A": 7.0, "C": 4.8, "D": 13.0, "E": 12.5, "F": 5.0, "G": 7.9, "H": 8.4, "I": 4.9, "K": 10.1, "L": 4.9,
    "M": 5.3, "N": 10.0, "P": 6.6, "Q": 8.6, "R": 9.1, "S": 7.5, "T": 6.6, "V": 5.6, "W": 5.2, "Y": 5.4,
}  # fmt: skip
"""Polar requirement of each amino acid (Woese et al. 1966; the values of Haig and Hurst 1991)."""

BASES = "TCAG"
CODONS = ["".join(letters) for letters in product(BASES, repeat=3)]
STANDARD = dict(zip(CODONS, "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG", strict=True))
"""The standard code, * = stop (NCBI translation table 1)."""

ACIDS = "".join(POLAR)
VALUES = torch.tensor(list(POLAR.values()), dtype=torch.float64)
PAIRS = torch.triu_indices(20, 20, 1)
TRANSITION = {"T": "C", "C": "T", "A": "G", "G": "A"}

Weight = Callable[[int, bool], float]
"""How likely a mistake is, by position (0 to 2) and whether it is a transition."""


def equal(position: int, transition: bool) -> float:
    """Every single-letter mistake alike (Haig and Hurst 1991)."""
    return 1.0


def freeland_hurst(position: int, transition: bool) -> float:
    """Mistranslation by position and transition bias (Freeland and Hurst 1998, table 2)."""
    return ((1.0, 0.5), (0.5, 0.1), (1.0, 1.0))[position][0 if transition else 1]


WEIGHTS: dict[str, Weight] = {"equal": equal, "freeland-hurst": freeland_hurst}


def usage_of(organism: str) -> dict[str, float]:
    """Returns how often an organism uses each codon among those of its amino acid."""
    table = python_codon_tables.get_codons_table(organism)
    return {codon.replace("U", "T"): share for shares in table.values() for codon, share in shares.items()}


def single_letter(weight: Weight, usage: Mapping[str, float] | None = None) -> list[tuple[str, str, float]]:
    """Returns (codon, codon it is mistaken for, weight) of all mistakes between codons that mean an amino acid."""
    return [
        (codon, wrong, weight(place, TRANSITION[codon[place]] == base) * (usage[codon] if usage else 1.0))
        for codon in CODONS
        for place in range(3)
        for base in BASES
        if base != codon[place] and STANDARD[codon] != "*"
        for wrong in [codon[:place] + base + codon[place + 1 :]]
        if STANDARD[wrong] != "*"
    ]


@cache
def mistakes(weight: str, organism: str = "") -> Floats:
    """Returns the share [20, 20] of mistakes from one block of codons into another."""
    found = np.zeros((20, 20))
    for codon, wrong, share in single_letter(WEIGHTS[weight], usage_of(organism) if organism else None):
        found[ACIDS.index(STANDARD[codon]), ACIDS.index(STANDARD[wrong])] += share
    result: Floats = found / found.sum()
    return result


def errors(orders: Tensor, shares: Tensor) -> Tensor:
    """Returns the error [n] of codes [n, 20]: which amino acid each block of codons has (squared polar requirement)."""
    values = VALUES.to(shares.dtype)[orders.long()]
    both = shares + shares.mT
    square: Tensor = (values.square() @ both.sum(-1)) - ((values @ both) * values).sum(-1)
    return square


def swapped(order: Tensor) -> Tensor:
    """Returns the 190 codes [190, 20] that differ from one by a swap of two amino acids."""
    codes = order.repeat(PAIRS.shape[1], 1)
    rows = torch.arange(PAIRS.shape[1])
    codes[rows, PAIRS[0]], codes[rows, PAIRS[1]] = order[PAIRS[1]], order[PAIRS[0]]
    return codes


def ranks(keys: Tensor) -> Tensor:
    """Returns the permutation that numbers stand for: the place of each among all."""
    return keys.argsort().argsort().to(keys.dtype)


def random_code(number: int) -> Tensor:
    """Returns a random code [20] by its number."""
    return torch.randperm(20, generator=torch.Generator().manual_seed(number)).float()


class Swaps(fedmeta.Solver):
    """The best swap of two amino acids, again and again, until none is better. A black box."""

    kind = "black box"

    def solve(
        self, problem: fedmeta.Problem, parameters: Parameters, data: Any, steps: int, rates: Rates
    ) -> list[Parameters]:
        """Returns the path of `steps` swaps; rates do not matter."""
        path = [parameters]
        for _ in range(steps):
            order = ranks(path[-1]["order"])
            codes = torch.cat([order[None], swapped(order)])
            path.append({**parameters, "order": codes[errors(codes, data["mistakes"]).argmin()]})
        return path


class GeneticCode(fedmeta.Problem, fedmeta.TaskSource):
    """One code for all organisms.

    Args:
        weight: How likely mistakes are: "equal" or "freeland-hurst".
        usage: Whether organisms weigh mistakes by their own codon usage; else all are alike.
    """

    metrics = (fedmeta.Metric("error", higher_is_better=False, unit="polar requirement squared"),)
    shared = ("trial", "restarts")
    solver = Swaps()
    held_out = False  # an organism has one table of codon usage

    def __init__(self, weight: str = "equal", usage: bool = True) -> None:
        self.weight_name, self.usage = weight, usage

    def init(self, seed: int) -> Parameters:
        """Returns a random code: the best one so far (`order`), where the search is (`trial`), and its restarts."""
        first = 1_000_000 * seed
        return {"order": random_code(first), "trial": random_code(first), "restarts": torch.tensor(float(first))}

    def constrain(self, parameters: Parameters) -> Parameters:
        """Returns permutations."""
        return {**parameters, "order": ranks(parameters["order"]), "trial": ranks(parameters["trial"])}

    def inner(self, parameters: Parameters, data: Any) -> Tensor:
        """Returns the error of the code."""
        return errors(parameters["order"][None], data["mistakes"])[0]

    def payload(self, path: list[Parameters], task: fedmeta.Task) -> dict[str, Tensor]:
        """Returns the errors of the best code, of the search's code, and of every swap of that."""
        codes = torch.stack([path[0]["order"], path[0]["trial"], *swapped(path[0]["trial"])])
        return {"errors": errors(codes, task.support["mistakes"])}

    def payload_shapes(self, state: Parameters) -> dict[str, tuple[int, ...]]:
        """Returns the shape of what organisms send."""
        return {"errors": (2 + PAIRS.shape[1],)}

    def outer_step(self, state: Parameters, total: Mapping[str, Tensor], weight: float) -> Parameters:
        """Swaps by the mean over organisms; where no swap is better, keeps the better code and starts elsewhere."""
        best, here, *_ = total["errors"].tolist()
        swaps = total["errors"][2:]
        if float(swaps.min()) < here - 1e-9 * abs(here):
            return {"trial": swapped(ranks(state["trial"]))[int(swaps.argmin())]}
        restarts = state["restarts"] + 1
        found = {"trial": random_code(int(restarts)), "restarts": restarts}
        return {**found, "order": state["trial"]} if here < best else found

    def picture(self, parameters: Parameters, data: Any) -> Floats:
        """Returns the code as a table: rows by first and third letter, columns by second; white = stop."""
        order = parameters["order"].long().tolist()
        image = np.ones((16, 4))
        for number, codon in enumerate(CODONS):
            first, second, third = number // 16, number // 4 % 4, number % 4
            if STANDARD[codon] != "*":
                polar = float(VALUES[order[ACIDS.index(STANDARD[codon])]])
                image[4 * first + third, second] = 0.9 * (13.0 - polar) / (13.0 - 4.8)
        return np.kron(image, np.ones((12, 36)))

    def sites(self) -> list[str]:
        """Returns the organisms' names."""
        return sorted(python_codon_tables.available_codon_tables_names)

    def task(self, site: str, purpose: str, round: int, seed: int) -> fedmeta.Task:
        """Returns an organism's mistakes, which it both adapts on and is scored by."""
        shares = torch.from_numpy(mistakes(self.weight_name, site if self.usage else ""))
        return fedmeta.Task({"mistakes": shares}, {"mistakes": shares})


def random_errors(shares: Floats, count: int, seed: int, at_once: int = 20_000) -> Floats:
    """Returns the errors of random codes that keep the blocks of codons: Haig and Hurst's null model."""
    random, own = np.random.default_rng(seed), torch.from_numpy(shares)
    draws = (torch.from_numpy(np.argsort(random.random((at_once, 20)), axis=1)) for _ in range(-(-count // at_once)))
    result: Floats = torch.cat([errors(orders, own) for orders in draws])[:count].numpy()
    return result


def shuffled_errors(weight: str, count: int, seed: int) -> Floats:
    """Returns the errors of random codes without blocks: meanings shuffled over the 61 codons, and who has how many."""
    pairs = single_letter(WEIGHTS[weight])
    places = {codon: k for k, codon in enumerate(c for c in CODONS if STANDARD[c] != "*")}
    meant, read = (np.array([places[pair[side]] for pair in pairs]) for side in (0, 1))
    share = np.array([pair[2] for pair in pairs])
    acids = np.array([ACIDS.index(STANDARD[codon]) for codon in places])
    random, polar = np.random.default_rng(seed), np.array(list(POLAR.values()))
    codes = (random.permutation(random.permutation(polar)[acids]) for _ in range(count))
    return np.array([((code[meant] - code[read]) ** 2 @ share) / share.sum() for code in codes])
