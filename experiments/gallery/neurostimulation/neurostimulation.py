"""Per-patient stimulation by Bayesian optimization, with a prior that the federation learns.

A patient's cortex is a stochastic neural mass (Jansen and Rit 1995) in its spiking regime, with own gains and own
distance to the lead. 500 settings of stimulation (10 amplitudes x 10 frequencies x 5 contacts) excite and inhibit it.
The response of a setting is how far it lowers activity, less its charge: the drop of log10 of the EEG's standard
deviation, minus .6 times amplitude times frequency / 200 Hz. A trial shows it with noise of .25.

Inner problem: choose settings and observe, by a Gaussian process; twenty trials. Outer problem: the process's mean and
covariance over 60 smooth features of settings. A site is a patient with 30 trials of the past at random settings. The
prior is the maximum-likelihood one, by expectation and maximization: each patient sends its expected weights and their
squares, the server adds them up (`Neurostimulation`); or by the marginal likelihood's gradients (`ByGradients`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fedmeta
from fedmeta.problems import GaussianProcessSearch
from fedmeta.problems.problem import Parameters

NOISE, TRIALS, FEATURES = 0.25, 30, 60
"""Standard deviation of a trial, trials of the past, features of settings."""

AMPLITUDES, FREQUENCIES, CONTACTS = np.linspace(0, 1, 10), np.geomspace(5, 200, 10), np.linspace(0, 1, 5)

LIMIT, CONFIDENCE = -0.2, 1.645
"""A response below the limit does harm; with the limit on, one trial in twenty may, by the prior (1.645 deviations)."""


def settings() -> NDArray[np.float64]:
    """Returns amplitude, log frequency and contact of each setting [500, 3], from 0 to 1."""
    grid = np.meshgrid(AMPLITUDES, np.log(FREQUENCIES / 5) / np.log(40), CONTACTS, indexing="ij")
    return np.stack([axis.ravel() for axis in grid], 1)


@cache
def responses(patients: int, seconds: float = 6.0, step: float = 1e-3) -> NDArray[np.float64]:
    """Returns each patient's response [patients, 500] to each setting, by simulation (forward Euler)."""
    random = np.random.default_rng(0)

    def column(mean: float, spread: float) -> NDArray[np.float32]:
        return random.normal(mean, spread, (patients, 1)).astype(np.float32)

    excitation, inhibition = column(4.1, 0.35).clip(3.5, 5), column(22, 1)  # mV; Jansen and Rit: 3.25 and 22
    drive, near, near_too = column(150, 20), column(0.65, 0.15), column(0.25, 0.15)
    amplitude, log_frequency, contact = settings().T.astype(np.float32)
    frequency = 5 * 40**log_frequency
    to_inhibition = 15 * np.exp(-(((contact - near) / 0.22) ** 2)) * amplitude
    to_excitation = 15 * np.exp(-(((contact - near_too) / 0.22) ** 2)) * amplitude
    a, b, c = 100.0, 50.0, 135.0  # rates (1/s) and connections
    y = np.zeros((6, patients, len(amplitude)), dtype=np.float32)
    phase, first, square, count = np.zeros(len(amplitude)), 0.0, 0.0, 0

    def rate(potential: Any) -> Any:
        return 5 / (1 + np.exp(0.56 * (6 - potential)))

    for moment in range(int(seconds / step)):
        phase += frequency * step
        pulse = (phase >= 1).astype(np.float32)
        phase %= 1
        noise = random.normal(0, 30 / np.sqrt(step * 100), (patients, 1)).astype(np.float32)
        force = (
            excitation * a * rate(y[1] - y[2] + to_excitation * pulse) - 2 * a * y[3] - a * a * y[0],
            excitation * a * (drive + noise + 0.8 * c * rate(c * y[0])) - 2 * a * y[4] - a * a * y[1],
            inhibition * b * 0.25 * c * rate(0.25 * c * y[0] + to_inhibition * pulse) - 2 * b * y[5] - b * b * y[2],
        )
        y[:3] += step * y[3:]
        y[3:] += step * np.stack(force)
        if moment > seconds / step / 4:
            eeg = y[1] - y[2]
            first, square, count = first + eeg, square + eeg.astype(np.float64) ** 2, count + 1
    activity = 0.5 * np.log10(np.maximum(square / count - (first / count) ** 2, 1e-6))
    still = activity[:, amplitude == 0].mean(1, keepdims=True)
    result: NDArray[np.float64] = still - activity - 0.6 * amplitude * frequency / 200
    return result


@cache
def basis() -> NDArray[np.float64]:
    """Returns features [500, 60]: the leading eigenvectors of a smooth kernel over settings, times their size."""
    place = settings() / np.array([0.15, 0.12, 0.3])
    kernel = np.exp(-0.5 * ((place[:, None] - place) ** 2).sum(-1))
    vectors, sizes, _ = np.linalg.svd(kernel)
    found: NDArray[np.float64] = vectors[:, :FEATURES] * np.sqrt(sizes[:FEATURES])
    return found


class Neurostimulation(fedmeta.Problem, fedmeta.TaskSource):
    """Trials at patients, under a prior that is learned by sums.

    Args:
        patients: The number of sites.
        limit: Whether settings are tried only where the response stays above `LIMIT` with 95 % confidence.
        memory: After how many trials a response is taken to have drifted; 0 for never.
        drift: After how many trials the patient answers like another one; 0 for never.
    """

    metrics = (
        fedmeta.Metric("regret", higher_is_better=False, unit="response short of the best setting's"),
        fedmeta.Metric("harmful_trials", higher_is_better=False, unit="trials so far"),
    )
    shared = ("factor",)

    def __init__(self, patients: int = 60, limit: bool = False, memory: float = 0, drift: int = 0) -> None:
        self.responses, self.features = torch.from_numpy(responses(patients)), torch.from_numpy(basis())
        self.drift = drift
        limits = {"limit": LIMIT if limit else None, "confidence": CONFIDENCE}
        self.solver = GaussianProcessSearch(noise=NOISE, memory=memory or float("inf"), **limits)

    def init(self, seed: int) -> Parameters:
        """Returns a prior that knows nothing but smoothness."""
        return {"mean": torch.zeros(FEATURES).double(), "factor": 0.3**0.5 * torch.eye(FEATURES).double()}

    def observe(self, data: Any, setting: int, trial: int) -> Tensor:
        """Returns the outcome of a trial at a patient."""
        random = torch.Generator().manual_seed(1000 * int(data["seed"]) + trial)
        now = int(bool(self.drift) and trial >= self.drift)
        return data["responses"][now, setting] + NOISE * torch.randn((), generator=random, dtype=torch.float64)

    def inner(self, parameters: Parameters, data: Any) -> Tensor:
        """Returns minus the log likelihood of a patient's past trials, which the prior is learned by."""
        loading = self.features[data["settings"].long()] @ parameters["factor"]
        matrix = loading @ loading.mT + NOISE**2 * torch.eye(len(loading), dtype=loading.dtype)
        root = torch.linalg.cholesky(matrix)
        left = data["outcomes"] - self.features[data["settings"].long()] @ parameters["mean"]
        white = torch.linalg.solve_triangular(root, left[:, None], upper=False)
        return 0.5 * white.square().sum() + root.diagonal().log().sum()

    def evaluate(self, parameters: Parameters, data: Any) -> dict[str, Tensor]:
        """Returns how far the setting that the posterior thinks best falls short, and harmful trials so far."""
        now = data["responses"][int(bool(self.drift) and len(parameters.get("tried", ())) > self.drift)]
        regret = now.max() - now[(self.features @ parameters["mean"]).argmax()]
        tried = parameters.get("tried", torch.tensor([], dtype=torch.int64))
        return {"regret": regret, "harmful_trials": (data["responses"][0][tried] < LIMIT).sum().to(regret)}

    def payload(self, path: list[Parameters], task: fedmeta.Task) -> dict[str, Tensor]:
        """Returns the expected weights of a patient's response, given its past trials, and their squares."""
        mean, data = path[0]["mean"], task.support
        covariance = path[0]["factor"] @ path[0]["factor"].mT
        rows = self.features[data["settings"].long()]
        gain = torch.linalg.solve(
            rows @ covariance @ rows.mT + NOISE**2 * torch.eye(TRIALS).double(), rows @ covariance
        )
        weights = mean + gain.mT @ (data["outcomes"] - rows @ mean)
        return {"first": weights, "second": covariance - (covariance @ rows.mT) @ gain + torch.outer(weights, weights)}

    def payload_shapes(self, state: Parameters) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of what patients send."""
        return {"first": (FEATURES,), "second": (FEATURES, FEATURES)}

    def outer_step(self, state: Parameters, total: Mapping[str, Tensor], weight: float) -> Parameters:
        """Returns the mean and a factor of the covariance of all patients' weights."""
        mean = total["first"] / weight
        covariance = total["second"] / weight - torch.outer(mean, mean)
        return {"mean": mean, "factor": torch.linalg.cholesky(covariance + 1e-9 * torch.eye(FEATURES).double())}

    def picture(self, parameters: Parameters, data: Any) -> NDArray[np.float64]:
        """Returns expected responses: amplitude down, frequency across, contacts side by side; 0 to 1 as -1 to 1."""
        expected = (self.features @ parameters["mean"]).reshape(10, 10, 5).permute(0, 2, 1).reshape(10, 50)
        return np.kron(((expected + 1) / 2).clamp(0, 1).numpy(), np.ones((8, 8)))

    def sites(self) -> list[str]:
        """Returns the patients' names."""
        return [f"patient-{number:02d}" for number in range(len(self.responses))]

    def task(self, site: str, purpose: str, round: int, seed: int) -> fedmeta.Task:
        """Returns a patient: past trials (the same in all rounds), and its responses, which only trials show."""
        number = int(site.rpartition("-")[2])
        random = torch.Generator().manual_seed(number)
        chosen = torch.randint(500, (TRIALS,), generator=random)
        outcomes = self.responses[number][chosen] + NOISE * torch.randn(TRIALS, generator=random, dtype=torch.float64)
        other = self.responses[(number + 7) % len(self.responses)]
        own = {"settings": chosen, "outcomes": outcomes, "responses": torch.stack([self.responses[number], other])}
        return fedmeta.Task(*({**own, "seed": torch.tensor(2 * (1000 * seed + number) + part)} for part in (0, 1)))


class ByGradients(Neurostimulation):
    """The same prior by gradients of the marginal likelihood, which the server's optimizer steps along."""

    outer_step = None

    def payload(self, path: list[Parameters], task: fedmeta.Task) -> dict[str, Tensor]:
        """Returns the gradient of minus the log likelihood of a patient's past trials by the prior."""
        own = {name: path[0][name] for name in ("mean", "factor")}
        found = torch.func.grad(lambda prior: self.inner(prior, task.support))(own)
        return {"theta.mean": found["mean"], "factor": found["factor"]}

    def payload_shapes(self, state: Parameters) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the gradient."""
        return {"theta.mean": (FEATURES,), "factor": (FEATURES, FEATURES)}
