"""The solution of an implicit solver, differentiated by the implicit function theorem and not through its steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev, vjp
from torch.utils._pytree import tree_flatten, tree_unflatten

from fedmeta.problems.problem import Data, Parameters, Problem

LARGEST_DENSE = 4096
"""Up to how many unknowns an implicit solution's Jacobian is formed; beyond, its system is solved by GMRES."""


def implicit(
    problem: Problem, parameters: Parameters, data: Data, steps: int, rates: Mapping[str, Tensor | float]
) -> Parameters:
    """Returns an implicit solver's solution, differentiable by parameters and data through `problem.residual`.

    With F(solution, parameters, data) = 0 its derivative is -(dF / d solution)^-1 dF / d (parameters, data), the
    implicit function theorem. The solver itself runs on plain tensors and may use any library.

    Args:
        problem: The problem, whose `residual` is zero at the solution.
        parameters: The start.
        data: The site's data.
        steps: The solver's steps.
        rates: The rate of each parameter that moves.
    """
    names = [name for name in parameters if name in rates]
    leaves, form = tree_flatten((parameters, data))
    apply: Any = _Implicit.apply  # torch leaves it untyped
    solution = apply(problem, names, form, steps, dict(rates), *leaves)
    return {**parameters, **dict(zip(names, solution, strict=True))}


class _Implicit(torch.autograd.Function):
    """The solution of an implicit problem as a function of the start's and the data's tensors."""

    @staticmethod
    def forward(
        problem: Problem, names: list[str], form: Any, steps: int, rates: Any, *leaves: Any
    ) -> tuple[Tensor, ...]:
        parameters, data = tree_unflatten(list(leaves), form)
        with torch.no_grad():
            plain = {name: rate.detach() if isinstance(rate, Tensor) else rate for name, rate in rates.items()}
            found = problem.solver.solve(problem, parameters, data, steps, plain)[-1]
        return tuple(found[name].clone() for name in names)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps what the derivative needs."""
        problem, names, form, _, _, *leaves = inputs
        ctx.problem, ctx.names, ctx.form = problem, names, form
        ctx.places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        ctx.rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.save_for_backward(*(leaf for leaf in leaves if isinstance(leaf, Tensor)), *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Returns the pullback by the implicit function theorem."""
        saved = list(ctx.saved_tensors)
        leaves, output = saved[: len(ctx.places)], saved[len(ctx.places) :]
        names = ctx.names
        solution = dict(zip(names, output, strict=True))

        def residual(own: Parameters, tensors: list[Tensor]) -> Parameters:
            every = list(ctx.rest)
            for place, tensor in zip(ctx.places, tensors, strict=True):
                every[place] = tensor
            parameters, data = tree_unflatten(every, ctx.form)
            found = ctx.problem.residual({**parameters, **own}, parameters, data)
            return {name: found[name] for name in names}

        known = dict(zip(names, grads, strict=True))
        adjoint = _adjoint(lambda own: residual(own, leaves), solution, known)
        floats = [k for k, leaf in enumerate(leaves) if leaf.is_floating_point()]

        def of_floats(values: list[Tensor]) -> Parameters:
            every = list(leaves)
            for k, value in zip(floats, values, strict=True):
                every[k] = value
            return residual(solution, every)

        (pulled,) = vjp(of_floats, [leaves[k] for k in floats])[1](adjoint)
        result: list[Tensor | None] = [None] * len(ctx.rest)
        for k, value in zip(floats, pulled, strict=True):
            result[ctx.places[k]] = -value
        return (None, None, None, None, None, *result)


def _adjoint(residual: Callable[[Parameters], Parameters], solution: Parameters, known: Parameters) -> Parameters:
    """Returns lambda with (dF / d solution)^T lambda = known."""
    sizes = {name: value.numel() for name, value in solution.items()}
    total = sum(sizes.values())
    names = list(solution)

    def flat(values: Parameters) -> Tensor:
        return torch.cat([values[name].reshape(-1) for name in names])

    def unflat(vector: Tensor) -> Parameters:
        parts = torch.split(vector, list(sizes.values()))
        return {name: part.reshape(solution[name].shape) for name, part in zip(names, parts, strict=True)}

    if total <= LARGEST_DENSE:
        jacobian = jacrev(lambda vector: flat(residual(unflat(vector))))(flat(solution))
        return unflat(torch.linalg.solve(jacobian.T, flat(known)))
    pull = vjp(lambda vector: flat(residual(unflat(vector))), flat(solution))[1]
    return unflat(_gmres(lambda vector: pull(vector)[0], flat(known)))


def _gmres(times: Callable[[Tensor], Tensor], target: Tensor, most: int = 500, tolerance: float = 1e-10) -> Tensor:
    """Returns x with A x = target by GMRES without restarts (Saad and Schultz 1986)."""
    norm = target.norm()
    if float(norm) == 0:
        return torch.zeros_like(target)
    basis, columns = [target / norm], []
    solution = torch.zeros_like(target)
    for step in range(most):
        vector = times(basis[-1])
        stacked = torch.stack(basis)
        column = stacked @ vector
        vector = vector - stacked.T @ column
        again = stacked @ vector  # orthogonalized twice: once is not enough in floating point
        vector, column = vector - stacked.T @ again, column + again
        length = vector.norm()
        columns.append(torch.cat([column, length[None]]))
        matrix = torch.stack([torch.cat([c, c.new_zeros(step + 2 - len(c))]) for c in columns], 1)
        right = torch.cat([norm[None], norm.new_zeros(step + 1)])
        weights = torch.linalg.lstsq(matrix, right[:, None]).solution[:, 0]
        if float((matrix @ weights - right).norm()) <= tolerance * float(norm) or float(length) == 0:
            found: Tensor = stacked.T @ weights
            return found
        solution = stacked.T @ weights
        basis.append(vector / length)
    return solution
