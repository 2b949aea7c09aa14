"""Writes a small federation to try things on: seven hospitals' tables, and an eighth hospital that joins later.

    python examples/hospitals.py FOLDER             # tables that can be read, some cells of them missing
    python examples/hospitals.py FOLDER --as-sent   # the same as hospitals send them: see below

The patients are made up, and so is what differs between hospitals: how much age, blood pressure and the ward count for
whether a patient comes back. As sent, one file has cholesterol in mg/dL, one a patient's number, one semicolons and
decimal commas, and one a line that is broken off.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd

HOSPITALS, ROWS, LATER, NEWCOMER = 7, 80, 60, 13


def patients(number: int, rows: int, own_share: float = 1.0) -> pd.DataFrame:
    """Returns a hospital's patients: numbers, text, missing cells, and whether they came back."""
    draw = np.random.default_rng(number)
    frame = pd.DataFrame(
        {
            "age": draw.integers(25, 90, rows),
            "sex": draw.choice(["F", "M"], rows),
            "smoker": draw.choice(["no", "yes", "former"], rows, p=[0.5, 0.3, 0.2]),
            "ward": draw.choice(["medicine", "surgery"], rows),
            "cholesterol": draw.normal(5.2, 0.9, rows).round(2),
            "bp": draw.normal(128, 14, rows).round(1),
        }
    )
    # What is common to all hospitals, and what each weighs in its own way.
    risk = 2.5 * (frame["cholesterol"] - 5.2) + 2.5 * (frame["smoker"] == "yes") - 0.6
    own = np.random.default_rng(100 + number).normal(0, own_share, 3)
    risk += own[0] * (frame["age"] - 57) / 19 + own[1] * (frame["bp"] - 128) / 14
    risk += own[2] * ((frame["ward"] == "surgery") - 0.5)
    frame["readmitted"] = np.where(draw.logistic(0, 0.3, rows) < risk, "yes", "no")
    for column in ("cholesterol", "smoker"):
        frame.loc[draw.random(rows) < 0.05, column] = None
    return frame


def as_sent(number: int, frame: pd.DataFrame) -> str:
    """Returns a hospital's table as it arrives."""
    if number == 3:
        frame = frame.assign(cholesterol=(frame["cholesterol"] * 38.67).round())
    if number == 4:
        frame.insert(0, "patient_id", 10_000 + np.arange(len(frame)))
    if number == 5:
        return frame.to_csv(index=False, sep=";", decimal=",")
    lines = frame.to_csv(index=False).splitlines()
    if number == 6:
        lines[40] = ",".join(lines[40].split(",")[:3])
    return "\n".join(lines) + "\n"


folder, messy = Path(sys.argv[1]), "--as-sent" in sys.argv
folder.mkdir(parents=True, exist_ok=True)
for number in range(1, HOSPITALS + 1):
    frame = patients(number, ROWS)
    text = as_sent(number, frame) if messy else frame.to_csv(index=False)
    (folder / f"hospital-{number}.csv").write_text(text)
# A newcomer that differs more from the others than they do from one another.
newcomer = patients(NEWCOMER, 40 + LATER, own_share=4.0)
newcomer.iloc[:40].to_csv(folder.parent / "newcomer.csv", index=False)
newcomer.iloc[40:].to_csv(folder.parent / "newcomer-later.csv", index=False)
