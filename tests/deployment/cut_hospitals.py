"""Cuts five hospitals' files, and three more sites', out of the heart data: cut_hospitals.py OUT [heart.npz].

Each file has its columns in another order. Without the data, made-up rows of the same form take their place.
"""

import sys
from pathlib import Path

import numpy as np

HOSPITALS = tuple(f"hospital-{letter}" for letter in "abcde")
OTHERS = ("intruder", "eavesdropper", "uncertified")


def heart(path: Path) -> tuple[list[str], np.ndarray, np.ndarray, list[np.ndarray]]:
    with np.load(path) as file:
        names, x, y, site = [str(name) for name in file["feature_names"]], file["x"], file["y"], file["site"]
    parts = [np.flatnonzero(site == number) for number in range(4)]
    return names, x, y, [parts[0][:150], parts[1], parts[2], parts[3], parts[0][150:]]


def made_up() -> tuple[list[str], np.ndarray, np.ndarray, list[np.ndarray]]:
    random = np.random.default_rng(7)
    x = random.normal(size=(500, 13))
    y = (x[:, 0] - x[:, 1] + random.normal(0, 0.5, 500) > 0).astype(int)
    x[random.random(x.shape) < 0.05] = np.nan
    return [f"feature_{column:02d}" for column in range(13)], x, y, np.array_split(np.arange(500), 5)


def write(path: Path, names: list[str], x: np.ndarray, y: np.ndarray, turn: int) -> None:
    columns = {**{name: x[:, column] for column, name in enumerate(names)}, "label": y}
    order = list(np.roll([*columns], turn))
    lines = [",".join(order)]
    for row in range(len(y)):
        cells = (columns[name][row] for name in order)
        lines.append(",".join("" if cell != cell else f"{cell:g}" for cell in cells))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def main(out: Path, source: Path | None) -> None:
    names, x, y, parts = heart(source) if source else made_up()
    for turn, (site, rows) in enumerate(zip(HOSPITALS, parts, strict=True)):
        write(out / site / f"{site}.csv", names, x[rows], y[rows], turn)
        write(out / "all" / f"{site}.csv", names, x[rows], y[rows], turn)
    for turn, site in enumerate(OTHERS):
        rows = np.random.default_rng(turn).permutation(len(y))[:60]
        write(out / site / f"{site}.csv", names, x[rows], y[rows], turn)


if __name__ == "__main__":
    given = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    main(Path(sys.argv[1]), given if given and given.exists() else None)
