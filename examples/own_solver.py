"""A solver of one's own: sign descent, whose steps all have one length whatever the size of a gradient."""

from fedmeta import Problem, Solver
from fedmeta.problems import Data, Parameters, Supervised
from fedmeta.problems.solvers import Rates, gradient


class SignDescent(Solver):
    """phi <- phi - rate * g / sqrt(g^2 + softness^2): a smooth sign, which learners can differentiate."""

    memoryless = True
    softness = 1e-3

    def solve(self, problem: Problem, parameters: Parameters, data: Data, steps: int, rates: Rates) -> list[Parameters]:
        path = [parameters]
        for _ in range(steps):
            own = path[-1]
            found = gradient(lambda p: problem.inner(p, data), own, rates)
            signs = {name: g / (g.square() + self.softness**2).sqrt() for name, g in found.items()}
            path.append({name: v - rates[name] * signs[name] if name in rates else v for name, v in own.items()})
        return path


class Rows(Supervised):
    """Supervised learning whose sites adapt by sign descent."""

    solver = SignDescent()
