"""What forgetting and re-adapting are worth in time: `python experiments/stream.py switch parkinson opponents`.

`switch`, `parkinson` and `opponents` are simulated, so that the truth is known; `har` replays the persons of HAR in the
order of their windows, as a federation. Prints tables in Markdown; pictures are written to `--pictures`.

- `switch`: a patient whose response to treatment turns at one row, as in septic shock: four features, a slope that
  changes its sign, noise of .7.
- `parkinson`: a slow drift (the disease) under a fast swing of the response with each dose (on and off).
- `opponents`: two sites whose objectives move against each other. Each sees what the other does as its own drift, and
  the equilibrium of the game is known.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmeta.stream.alarm import watch
from fedmeta.stream.replay import Replay, in_hindsight, regret, replay

Floats = NDArray[np.float64]

BLOCK = 20
WINDOW = 40
RATE = 0.01
WAYS = ("never", "always, all rows", "always, a window", "at the alarm")


@dataclass
class Patient:
    """A site whose rows come in time.

    Attributes:
        x: Features [rows, features].
        y: Responses [rows].
        truth: The slope at each row [rows, features].
        changes: The rows at which the slope jumps.
        noise: Its standard deviation.
    """

    x: Floats
    y: Floats
    truth: Floats
    changes: tuple[int, ...] = ()
    noise: float = 0.7

    def losses(self, here: NDArray[np.int64], there: NDArray[np.int64]) -> Floats:
        """Returns squared errors on rows of a ridge regression (strength 1) on others."""
        x, y = self.x[here], self.y[here]
        slope = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ y)
        errors: Floats = (self.y[there] - self.x[there] @ slope) ** 2
        return errors


def patient(truth: Floats, draw: np.random.Generator, changes: Sequence[int] = (), noise: float = 0.7) -> Patient:
    """Returns a site with these slopes."""
    x = draw.normal(size=truth.shape)
    return Patient(x, (x * truth).sum(1) + noise * draw.normal(size=len(x)), truth, tuple(changes), noise)


def switch(seed: int, rows: int = 400) -> Patient:
    """Returns a patient whose slope changes its sign at a row between 150 and 250."""
    draw = np.random.default_rng([seed, 1])
    at = int(draw.integers(150, 250))
    slope = draw.normal(size=4)
    truth = np.where(np.arange(rows)[:, None] < at, slope, -slope)
    return patient(truth, draw, (at,))


def parkinson(seed: int, rows: int = 600) -> Patient:
    """Returns a patient whose slopes drift slowly, one of them swinging with each dose, every 60 rows."""
    draw = np.random.default_rng([seed, 2])
    drift = np.cumsum(0.02 * draw.normal(size=(rows, 4)), 0) + draw.normal(size=4)
    drift[:, 0] += np.sin(2 * np.pi * np.arange(rows) / 60)
    return patient(drift, draw)


def replayed(site: Patient, way: str) -> Replay:
    """Returns a site's replay in one of the `WAYS`."""
    rows = len(site.y)
    if way == "never":

        def fixed(here: NDArray[np.int64], there: NDArray[np.int64]) -> Floats:
            return site.losses(np.arange(BLOCK), there)

        return replay(fixed, rows, BLOCK, "all")
    if way == "always, all rows":
        return replay(site.losses, rows, BLOCK, "all")
    if way == "always, a window":
        return replay(site.losses, rows, BLOCK, "window", window=WINDOW)
    return replay(site.losses, rows, BLOCK, "alarm", rate=RATE)


def hindsight(site: Patient) -> Floats:
    """Returns the losses of what knows best: the stretches between changes, or the true slope where it drifts."""
    rows = len(site.y)
    if site.changes:
        return in_hindsight(site.losses, rows, site.changes, BLOCK)
    errors: Floats = ((site.y - (site.x * site.truth).sum(1)) ** 2)[BLOCK:]
    return errors


@dataclass
class Table:
    """What several seeds came to, by way.

    Attributes:
        regrets: The regret of each seed at the end.
        curves: The regret after each row of each seed.
        delays: The rows from a change to the next alarm.
        early: Alarms before the first change, or all where there is none.
    """

    regrets: list[float] = field(default_factory=list)
    curves: list[Floats] = field(default_factory=list)
    delays: list[int] = field(default_factory=list)
    early: int = 0


def patients(make: Callable[[int], Patient], seeds: int) -> dict[str, Table]:
    """Returns what replaying so many patients came to in each way."""
    found = {way: Table() for way in WAYS}
    for seed in range(seeds):
        site = make(seed)
        best = hindsight(site)
        for way in WAYS:
            played = replayed(site, way)
            own = regret(played, best)
            found[way].regrets.append(float(own[-1]))
            found[way].curves.append(own)
            at = site.changes[0] if site.changes else len(site.y)
            late = [row for row in played.alarms if row >= at]
            found[way].early += sum(row < at for row in played.alarms)
            found[way].delays += [late[0] - at] if late else []
    return found


# Two players: the first loses (a - p + 0.9 b)^2 / 2 with p = 1, the second (b - q - 0.9 a)^2 / 2 with q = -1.
PULL, GOALS = 0.9, np.array([1.0, -1.0])


def equilibrium() -> Floats:
    """Returns where neither gains by moving: a = p - 0.9 b and b = q + 0.9 a."""
    found: Floats = np.linalg.solve(np.array([[1.0, PULL], [-PULL, 1.0]]), GOALS)
    return found


def game(seed: int, way: str, blocks: int = 40, rows: int = 10, noise: float = 0.5) -> tuple[Floats, Floats]:
    """Plays a game of two sites that learn; each block both see noisy best responses to what the other does.

    Args:
        seed: Key of the noise.
        way: One of the `WAYS`: a player moves to the mean of the responses that it remembers.
        blocks: How many blocks are played; both move after each.
        rows: Rows of a block.
        noise: Of a row's response.

    Returns:
        The distance of both from the equilibrium after each block [blocks], and the regret of the first player up to
        each block: its loss beyond that of a best response to what the other does [blocks].
    """
    draw = np.random.default_rng([seed, 3])
    play = np.zeros(2)
    seen: list[list[float]] = [[], []]
    since, watched = [0, 0], [0, 0]
    scores: list[list[float]] = [[], []]
    distance, beyond = np.empty(blocks), np.empty(blocks)
    for block in range(blocks):
        best = np.array([GOALS[0] - PULL * play[1], GOALS[1] + PULL * play[0]])
        distance[block] = np.linalg.norm(play - equilibrium())
        beyond[block] = 0.5 * (play[0] - best[0]) ** 2 * rows
        before = play.copy()
        for player in range(2):
            responses = best[player] + noise * draw.normal(size=rows)
            scores[player] += ((responses - before[player]) ** 2).tolist()
            seen[player] += responses.tolist()
            if way == "never" and block:
                continue
            own = np.array(seen[player])
            if way == "always, a window":
                own = own[-2 * rows :]
            if way == "at the alarm":
                heard = watch(np.array(scores[player][watched[player] :]), RATE, seed)
                if heard.alarm is not None and heard.change is not None:
                    since[player], watched[player] = watched[player] + heard.change, len(scores[player])
                own = own[since[player] :]
            play[player] = own.mean()
    return distance, np.cumsum(beyond)


def interval(values: Sequence[float]) -> str:
    """Returns a mean with half of its 95 % interval over seeds (normal)."""
    own = np.asarray(values)
    half = 1.96 * own.std(ddof=1) / np.sqrt(len(own)) if len(own) > 1 else float("nan")
    return f"{own.mean():.1f} ± {half:.1f}"


def print_patients(name: str, found: dict[str, Table], seeds: int) -> None:
    """Prints what patients came to."""
    print(f"\n{name}, {seeds} seeds, blocks of {BLOCK} rows, a window of {WINDOW}, alarms at a rate of {RATE}\n")
    print("| a site adapts | regret | at the alarm, against it | delay (rows) | alarms before a change |")
    print("|---|---:|---:|---:|---:|")
    alarmed = np.array(found[WAYS[-1]].regrets)
    for way, own in found.items():
        less = "" if way == WAYS[-1] else interval((alarmed - np.array(own.regrets)).tolist())
        delay = f"{np.median(own.delays):.0f} ({len(own.delays)} of {seeds})" if own.delays else ""
        print(f"| {way} | {interval(own.regrets)} | {less} | {delay} | {own.early if way == WAYS[-1] else ''} |")


def print_opponents(seeds: int, pictures: Path | None) -> None:
    """Prints, and draws, how two players that learn come to their equilibrium."""
    print(f"\nopponents, {seeds} seeds, 40 blocks of 10 rows; the equilibrium is {equilibrium().round(3).tolist()}\n")
    print("| both adapt | distance after 10 blocks | after 40 | regret of the first |")
    print("|---|---:|---:|---:|")
    curves = {}
    for way in WAYS:
        played = [game(seed, way) for seed in range(seeds)]
        distances, regrets = np.array([each[0] for each in played]), np.array([each[1] for each in played])
        curves[way] = list(distances)
        far = [f"{distances[:, place].mean():.3f}" for place in (9, 39)]
        print(f"| {way} | {far[0]} | {far[1]} | {interval(regrets[:, -1].tolist())} |")
    if pictures:
        draw(pictures / "opponents.png", curves, "block", "distance from the equilibrium")


def draw(path: Path, curves: dict[str, list[Floats]], across: str, up: str) -> None:
    """Draws the mean of curves by way, with the middle half of the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for way, own in curves.items():
        low, mean, high = np.quantile(own, 0.25, 0), np.mean(own, 0), np.quantile(own, 0.75, 0)
        (line,) = axes.plot(mean, label=way)
        axes.fill_between(np.arange(len(mean)), low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel=across, ylabel=up)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


HAR_KEYS = (
    "data.split=time", "data.standardise=none", "data.support=400", "data.query=50", "stream.block=50",
    "server.rounds=36", "evaluation.every=6", "evaluation.local_baseline=none", "learner.inner_lr=0.05",
    "tracking.uri=none", "runtime.threads=1",
)  # fmt: skip
HAR_WAYS = {
    "a start that learns, all rows": (),
    "a start that learns, a window of 100": ("stream.memory=window", "stream.window=100"),
    "a start that learns, recent rows rather": ("stream.memory=discount", "stream.half_life=50"),
    "a start that learns, rows since the alarm": ("stream.memory=alarm",),
    "a start fixed after the first block": ("stream.learn=1",),
    "federated averaging": ("learner.name=fedavg", "learner.inner_lr=0.05"),
}


def print_har(seeds: int, folder: Path) -> None:
    """Runs and prints the ways of a federation in time on HAR."""
    from fedmeta import load_experiment, run

    file = Path(__file__).parent / "har.toml"
    print(f"\nHAR, blocks of 50 windows, 6 rounds between two blocks, {seeds} seeds; new persons, mean over 6 blocks\n")
    print("| the federation | accuracy, not adapted | adapted | last block, adapted | regret | alarms |")
    print("|---|---:|---:|---:|---:|---:|", flush=True)
    for way, keys in HAR_WAYS.items():
        own = []
        for seed in range(seeds):
            more = [*HAR_KEYS, *keys, f"tracking.folder={folder}", f"runtime.seed={seed}"]
            own.append(run(load_experiment(file, more)).summary["stream"])
        news = [each["new_sites"] for each in own]

        def over(values: list[float]) -> str:
            return f"{np.mean(values):.3f}" + (f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else "")

        cells = [
            over([each["mean"]["global"] for each in news]),
            over([each["mean"]["personalized"] for each in news]),
            over([each["personalized"][-1] for each in news]),
            over([each["regret"] for each in news]),
            str(sum(len(each["alarms"]) for each in own)),
        ]
        print(f"| {way} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Prints the tables that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=("switch", "parkinson", "opponents", "har"))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("fedmeta-runs/stream"))
    parser.add_argument("--pictures", type=Path, default=None)
    asked = parser.parse_args()
    for name in asked.names:
        if name == "har":
            print_har(asked.seeds, asked.folder)
        elif name == "opponents":
            print_opponents(asked.seeds, asked.pictures)
        else:
            found = patients({"switch": switch, "parkinson": parkinson}[name], asked.seeds)
            print_patients(name, found, asked.seeds)
            if asked.pictures:
                curves = {way: own.curves for way, own in found.items()}
                draw(asked.pictures / f"{name}.png", curves, "rows scored", "regret")


if __name__ == "__main__":
    main()
