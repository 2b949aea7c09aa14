"""The five files of the tutorial: mixed columns, one file in other units, one with an id, one with a short line."""

from pathlib import Path

import numpy as np
import pandas as pd

NAMES = ("abbey", "bridge", "castle", "dean", "elm")


def frames(rows: int = 90, seed: int = 0) -> dict[str, pd.DataFrame]:
    """Returns the hospitals' patients: numbers, two columns of text, a date, and whether they came back."""
    found = {}
    for number, name in enumerate(NAMES):
        draw = np.random.default_rng(seed + number)
        age = draw.integers(25, 90, rows)
        chol = np.round(draw.normal(5.2, 0.9, rows), 2)
        sex, smoker = draw.choice(["F", "M"], rows), draw.choice(["no", "yes", "former"], rows, p=[0.5, 0.3, 0.2])
        risk = 0.05 * (age - 55) + 0.8 * (chol - 5.2) + 1.2 * (smoker == "yes") + 0.5 * (sex == "M") - 0.6
        found[name] = pd.DataFrame(
            {
                "admitted": pd.date_range("2023-01-01", periods=rows).strftime("%Y-%m-%d"),
                "age": age,
                "sex": sex,
                "smoker": smoker,
                "cholesterol": chol,
                "bp": np.round(draw.normal(128, 14, rows), 1),
                "readmitted": np.where(draw.random(rows) < 1 / (1 + np.exp(-risk)), "yes", "no"),
            }
        )
    return found


def write(folder: Path, rows: int = 90) -> Path:
    """Writes the files as hospitals send them, with what is wrong with them, and returns their folder."""
    folder.mkdir(exist_ok=True)
    for name, frame in frames(rows).items():
        if name == "castle":
            frame = frame.assign(cholesterol=np.round(frame["cholesterol"] * 38.67))
        if name == "dean":
            frame.insert(0, "patient_id", 10_000 + np.arange(rows))
        text = frame.to_csv(index=False)
        if name == "elm":
            lines = text.splitlines()
            lines[40] = ",".join(lines[40].split(",")[:3])
            text = "\n".join(lines) + "\n"
        (folder / f"{name}.csv").write_text(text)
    return folder


def write_one(path: Path, rows: int = 90) -> Path:
    """Writes all hospitals into one file, with a column that names them."""
    parts = [frame.assign(hospital=name) for name, frame in frames(rows).items()]
    pd.concat(parts).to_csv(path, index=False)
    return path
