"""One fit for all sites of a problem on tables."""

from collections.abc import Sequence

import torch

from fedmeta.problems.problem import Parameters, Problem


def joined(parts: Sequence[Parameters]) -> Parameters:
    """The rows of several sites as one site's."""
    return {name: torch.cat([each[name] for each in parts]) for name in parts[0]}


def fitted(problem: Problem, data: Parameters) -> Parameters:
    """The minimum of a problem's inner objective, by L-BFGS."""
    own = {name: value.requires_grad_() for name, value in problem.init(0).items()}
    step = torch.optim.LBFGS(own.values(), max_iter=50)

    def closure() -> torch.Tensor:
        step.zero_grad()
        loss = problem.inner(own, data)
        loss.backward()
        return loss

    step.step(closure)
    return {name: value.detach() for name, value in own.items()}
