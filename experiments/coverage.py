"""Does the 90 % interval of `fedmeta adapt` cover the truth, and whom does its advice serve? Measured on new sites.

    python experiments/coverage.py

trains experiments/writers.toml, digits.toml and har.toml, gives rows of each new site to the code of `fedmeta adapt`,
and holds its interval against the accuracy on the site's other rows. It then times the command itself, cold, on a new
person of experiments/har.toml with 40 rows, and writes experiments/results/coverage.md.

A writer's other rows are 75 to 95, so that the accuracy on them is itself uncertain by 2 to 3 points: even an interval
that is never wrong would miss some. Two figures are beside the raw one for that. `ideal` is what the raw figure would
be if each row of the site were scored by the final model, independently (simulated from the spread of accuracies that
the test rows show). `at least` is the mean probability that the interval holds the true accuracy, given the test rows
alone, under that spread; it leaves out what the interval's own rows show of the site, and so errs on the low side.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import betainc, betaln
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import fedmeta
from fedmeta import checkpoint, data
from fedmeta.adapt.estimate import PERSONAL, cross_validate
from fedmeta.adapt.initialization import MetaModel
from fedmeta.adapt.intervals import accuracy
from fedmeta.adapt.model import SiteModel
from fedmeta.experiment import Experiment, load_experiment
from fedmeta.models import Parameters

HERE = Path(__file__).parent
SIZES = {"writers": (10, 20, 40), "digits": (10, 20), "har": (10, 20, 40)}
DRAWS = {"writers": 1, "digits": 5, "har": 5}
"""How often each new site's rows are drawn: there are eight new sites of the digits, and four new persons."""

FEWEST_TEST_ROWS = 10
SIMULATIONS = 200


def trained(file: str, folder: Path, earlier: str) -> tuple[MetaModel, checkpoint.Checkpoint]:
    """Returns what a run of an experiment leaves: of an earlier one's folder, or of a new one."""
    if earlier:
        found = checkpoint.newest(Path(earlier))[0]
    else:
        overrides = ["tracking.uri=none", f"tracking.folder={folder}", "evaluation.every=0"]
        found = checkpoint.newest(fedmeta.run(load_experiment(HERE / file, overrides)).folder)[0]
    return MetaModel.of(found), found


def scored(start: MetaModel, run: checkpoint.Checkpoint, rows: int, draws: int = 1) -> dict[str, NDArray[np.float64]]:
    """Returns, per new site and draw of rows, the estimate with its interval and accuracies on the site's other rows.

    Where neighboring rows resemble each other (data.split = "blocks") the rows are drawn from the first half of a
    site's time, and the second half scores.
    """
    population = data.load(Experiment.from_toml(run.experiment).data)
    theta = start.learner.theta(start.state)
    model = SiteModel.of(start, theta)
    codes = data.class_codes(population.class_names, start.form.classes)
    draw = np.random.default_rng(0)
    found: dict[str, list[float]] = {name: [] for name in ("test_rows", "steps", *RULES, *COLUMNS)}
    for site in np.repeat(population.find(run.new_sites), draws):
        own = population.rows(np.array([site])).rows
        if start.experiment.data.neighbors_alike:
            first = np.sort(draw.choice(len(own) // 2, rows, replace=False))
            own = np.concatenate([own[first], own[len(own) // 2 :]])
        else:
            own = own[draw.permutation(len(own))]
        if len(own) < rows + FEWEST_TEST_ROWS:
            continue
        x, y = model.prepare(population.features(own).float()), torch.from_numpy(codes[population.labels(own)])
        result = cross_validate(start, x[:rows], y[:rows])
        chosen = start.learner.adapt(start.state, (x[:rows], y[:rows]), result.chosen)

        def truth(parameters: Parameters, x: Tensor = x, y: Tensor = y) -> float:
            outputs = start.learner.predict(parameters, x[rows:]).detach()
            return float((outputs.argmax(-1) == y[rows:]).double().mean())

        found["test_rows"].append(len(own) - rows)
        found["steps"].append(result.steps)
        by_rule = [truth(theta), truth(chosen if result.advice == PERSONAL else theta)]
        by_rule += [truth(result.parameters), truth(chosen), alone(x.flatten(1).numpy(), y.numpy(), rows)]
        for rule, value in zip(RULES, by_rule, strict=True):
            found[rule].append(value)
        for name, estimate, parameters in (
            ("global", result.before, theta),
            ("model", result.best, result.parameters),
        ):
            figures = (estimate.score, estimate.low, estimate.high, truth(parameters))
            for figure, value in zip(FIGURES, figures, strict=True):
                found[f"{name}_{figure}"].append(value)
    return {name: np.array(values) for name, values in found.items()}


def alone(x: NDArray[np.float64], y: NDArray[np.int64], rows: int) -> float:
    """Returns the accuracy on a site's later rows of scikit-learn's logistic regression fitted to its first ones."""
    if len(np.unique(y[:rows])) < 2:
        return float((y[rows:] == y[0]).mean())
    return float((LogisticRegression(max_iter=1000).fit(x[:rows], y[:rows]).predict(x[rows:]) == y[rows:]).mean())


RULES = ("global", "where proven", "as advised", "always adapted", "local-only")
"""Which model each site uses."""

FIGURES = ("score", "low", "high", "truth")
COLUMNS = tuple(f"{name}_{figure}" for name in ("global", "model") for figure in FIGURES)


def coverage(found: dict[str, NDArray[np.float64]], name: str, rows: int) -> dict[str, float]:
    """Returns the raw coverage of one of the two models' intervals, and what it is to be held against."""
    low, high, truth = (found[f"{name}_{figure}"] for figure in ("low", "high", "truth"))
    tests = found["test_rows"]
    right = np.round(truth * tests)
    a, b = spread(right, tests)
    mass = betainc(a + right, b + tests - right, high) - betainc(a + right, b + tests - right, low)
    return {
        "sites": len(tests),
        "estimate": float(found[f"{name}_score"].mean()),
        "truth": float(truth.mean()),
        "width": float((high - low).mean()),
        "raw": float(((low <= truth + 1e-9) & (truth <= high + 1e-9)).mean()),
        "ideal": ideal(a, b, tests, rows),
        "at least": float(mass.mean()),
    }


def spread(right: NDArray[np.float64], tests: NDArray[np.float64]) -> tuple[float, float]:
    """Returns the beta distribution of true accuracies over sites that fits the test rows best (beta-binomial)."""

    def loss(logs: NDArray[np.float64]) -> float:
        a, b = np.exp(logs)
        return -float(np.sum(betaln(right + a, tests - right + b) - betaln(a, b)))

    a, b = np.exp(minimize(loss, np.array([2.0, 0.0]), method="Nelder-Mead").x)
    return float(a), float(b)


def ideal(a: float, b: float, tests: NDArray[np.float64], rows: int) -> float:
    """Returns the raw coverage of intervals from rows that are each scored by the final model, independently."""
    draw = np.random.default_rng(0)
    ends = [accuracy(np.array([right / rows]), np.array([rows])) for right in range(rows + 1)]
    low, high = np.array([end.low for end in ends]), np.array([end.high for end in ends])
    shares = []
    for _ in range(SIMULATIONS):
        true = draw.beta(a, b, len(tests))
        seen = draw.binomial(rows, true)
        measured = draw.binomial(tests.astype(int), true) / tests
        shares.append(((low[seen] <= measured + 1e-9) & (measured <= high[seen] + 1e-9)).mean())
    return float(np.mean(shares))


def cold(start: MetaModel, run: checkpoint.Checkpoint, folder: Path) -> dict[str, float]:
    """Returns how long `fedmeta adapt` takes, from a new process on, for a new person's 40 rows; and what it found."""
    experiment = Experiment.from_toml(run.experiment)
    population = data.load(experiment.data)
    own = population.rows(population.find(run.new_sites[:1])).rows
    first, later = own[: len(own) // 2], own[len(own) // 2 :]
    names = {"class_names": np.array(population.class_names), "feature_names": np.array(population.feature_names)}
    for name, rows in (("mine", first[np.linspace(0, len(first) - 1, 40).astype(int)]), ("later", later)):
        np.savez(folder / f"{name}.npz", x=population.features(rows).numpy(), y=population.labels(rows), **names)
    start.write(folder / "meta_model.safetensors")
    command = [sys.executable, "-m", "fedmeta", "adapt", str(folder / "meta_model.safetensors"), "--json"]
    command += ["--data", str(folder / "mine.npz"), "--test", str(folder / "later.npz"), "--out", str(folder / "out")]
    before, started = os.times(), time.perf_counter()
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds, after = time.perf_counter() - started, os.times()
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": seconds, "processor": processor, **json.loads(output.strip().splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in SIZES:
        parser.add_argument(
            f"--{name}", default="", help=f"the folder of a finished run of {name}.toml, to use instead"
        )
    options = vars(parser.parse_args())
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        lines: list[str] = []
        rules: list[str] = []
        started = time.perf_counter()
        for data_set, sizes in SIZES.items():
            start, run = trained(f"{data_set}.toml", folder, options[data_set])
            for rows in sizes:
                found = scored(start, run, rows, DRAWS[data_set])
                lines += _covered(data_set, rows, found)
                harmed = float((found["as advised"] < found["global"]).mean())
                cells = [
                    data_set,
                    str(rows),
                    str(len(found["steps"])),
                    *(f"{found[rule].mean():.3f}" for rule in RULES),
                ]
                cells += [f"{harmed:.0%}", f"{(found['steps'] > 0).mean():.0%}"]
                rules.append("| " + " | ".join(cells) + " |")
                print(*lines[-2:], rules[-1], sep="\n", file=sys.stderr, flush=True)
        seconds = time.perf_counter() - started
        person = cold(start, run, folder)
    write(lines, rules, seconds, person)


def _covered(data_set: str, rows: int, found: dict[str, NDArray[np.float64]]) -> list[str]:
    """Returns the table's two lines of one data set and number of rows."""
    lines = []
    for name, label in (("global", "global"), ("model", "as advised")):
        own = coverage(found, name, rows)
        cells = [data_set, str(rows), label, f"{own['sites']:.0f}", f"{np.median(found['test_rows']):.0f}"]
        cells += [f"{own[key]:.3f}" for key in ("estimate", "truth", "width")] + [f"**{own['raw']:.1%}**"]
        cells += [f"{own['ideal']:.1%}", f"{own['at least']:.1%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def write(lines: list[str], rules: list[str], seconds: float, person: dict[str, float]) -> None:
    """Writes the report."""
    import platform

    heads = ["data", "rows", "model", "sites", "test rows (median)", "estimate", "truth", "width"]
    heads += ["covered", "ideal", "at least"]
    text = [
        "# What the interval of `fedmeta adapt` covers, and what its advice gives",
        "",
        "    python experiments/coverage.py",
        "",
        "New sites of `experiments/writers.toml`, `digits.toml` and `har.toml` (maml, 200 rounds, seed 0): none took",
        "part in training. Each gives so many rows to `fedmeta adapt`; its 90 % interval is held against the",
        "accuracy of the model that it writes on the site's other rows. Writers' and digits' rows are drawn at random,",
        "persons' from the first half of their time, and the second half scores. Digits' eight new sites and the four",
        "new persons stand here with five draws each, which are not independent.",
        "",
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
        *lines,
        "",
        "The accuracy on few test rows is itself uncertain (on 75 by two to three points), which counts against the",
        "interval. *ideal* is what Clopper and Pearson's would cover were the rows scored independently by the final",
        f"model itself; *at least* bounds from below how often the true accuracy is held. {seconds:.0f} s.",
        "",
        "## What the advice gives",
        "",
        "Mean accuracy on the same other rows by which model a site uses: the global one; the adapted one only",
        "where the interval of the difference on its own rows lies above 0; as advised, which also adapts where these",
        "rows do not decide and adapting helped the run's training sites on average; adapted always; or scikit-learn's",
        "logistic regression on the same rows, without the federation. *harmed*: how many do worse as advised than",
        "with the global model; *adapted*: how many are advised to use the adapted one.",
        "",
        "| data | rows | sites | " + " | ".join(RULES) + " | harmed | adapted |",
        "|" + "---|" * (len(RULES) + 5),
        *rules,
        "",
        "## Cold",
        "",
        "`fedmeta adapt` from a new process to the finished folder, for a new person of `experiments/har.toml` with 40",
        f"rows of 561 features: {person['seconds']:.1f} s by the clock, {person['processor']:.1f} s of one processor "
        f"({platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end).",
        f"ONNX and torch differ by {person['onnx_difference']:.1e} on the rows. Estimate for the model that it advises "
        f"({person['advice']}): {_interval(person)}; on {person['test_rows']} later rows of the person: "
        f"{_advised(person)['test']:.3f}.",
    ]
    out = HERE / "results" / "coverage.md"
    out.parent.mkdir(exist_ok=True)
    out.write_text("\n".join(text) + "\n")
    print(out)


def _advised(person: dict[str, object]) -> dict[str, float]:
    own = person["personalized" if person["advice"] == "personal" else "global"]
    assert isinstance(own, dict)
    return own


def _interval(person: dict[str, object]) -> str:
    own = _advised(person)
    return f"{own['estimate']:.3f} [{own['low']:.3f}, {own['high']:.3f}]"


if __name__ == "__main__":
    main()
