"""Writes a small federation to try things on: seven hospitals, and an eighth that joins later.

The rows are scikit-learn's copy of the Wisconsin breast cancer data (569 biopsies, 30 measurements, benign or
malignant), dealt at random; that each hospital's instruments have a gain and an offset of their own is made up.
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer

HOSPITALS, ROWS = 8, 70

folder = Path(sys.argv[1])
measured = load_breast_cancer(as_frame=True)
rows = measured.data.sample(frac=1, random_state=0)
label = measured.target.map({0: "malignant", 1: "benign"})
random = np.random.default_rng(0)
folder.mkdir(parents=True, exist_ok=True)
for number in range(1, HOSPITALS + 1):
    own = rows.iloc[(number - 1) * ROWS : number * ROWS]
    gain, offset = random.uniform(0.3, 2, own.shape[1]), random.normal(0, 2, own.shape[1])
    own = (own * gain + offset * own.std()).round(4).assign(diagnosis=label[own.index])
    if number < HOSPITALS:
        own.to_csv(folder / f"hospital-{number}.csv", index=False)
    else:
        own.iloc[:40].to_csv(folder.parent / "newcomer.csv", index=False)
        own.iloc[40:].to_csv(folder.parent / "newcomer-later.csv", index=False)
