"""Rounds of plain federated averaging in `pfl`, written as its own guides do; `rounds.py` runs this.

    PYTHON_WITH_PFL experiments/benchmarks/pfl_rounds.py DATA.npz ROUNDS STEPS LR THREADS

Needs only pfl, torch and numpy. Prints the seconds of each round but the first, in which pfl evaluates, as JSON.
"""

import json
import sys
import time
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn


class Network(nn.Sequential):
    """The network with what pfl asks of a model."""

    def loss(self, x: Tensor, y: Tensor, eval: bool = False) -> Tensor:
        self.eval() if eval else self.train()
        return nn.functional.cross_entropy(self(x), y)

    @torch.no_grad()
    def metrics(self, x: Tensor, y: Tensor, eval: bool = True) -> dict[str, Any]:
        return {"loss": Weighted(self.loss(x, y, eval).item() * len(y), len(y))}


class Stopwatch(TrainingProcessCallback):
    """Notes when each round ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        self.ends.append(time.perf_counter())
        return False, Metrics()


def main(path: str, rounds: int, steps: int, lr: float, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    data = np.load(path)
    users = {
        int(site): [
            torch.from_numpy(data["x"][data["site"] == site]),
            torch.from_numpy(data["y"][data["site"] == site]),
        ]
        for site in np.unique(data["site"])
    }
    sampler = get_user_sampler("minimize_reuse", list(users))
    federation = FederatedDataset.from_slices(users, sampler)
    width, classes, hidden = data["x"].shape[1], int(data["y"].max()) + 1, int(data["hidden"])
    network = Network(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, classes))
    stopwatch = Stopwatch()
    FederatedAveraging().run(
        backend=SimulatedBackend(training_data=federation, val_data=federation),
        model=PyTorchModel(
            model=network,
            local_optimizer_create=torch.optim.SGD,
            central_optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
        ),
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds + 1,
            evaluation_frequency=rounds + 2,
            train_cohort_size=len(users),
            val_cohort_size=0,
        ),
        model_train_params=NNTrainHyperParams(local_num_epochs=steps, local_learning_rate=lr, local_batch_size=None),
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[stopwatch],
    )
    print(json.dumps(np.diff(stopwatch.ends).tolist()))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]))
