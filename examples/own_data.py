"""Data of one's own: a file with an array per column. Patients with diabetes; a site is an age group of one sex."""

from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.datasets import load_diabetes

patients = load_diabetes(as_frame=True, scaled=False).frame
decade = (patients["age"] // 10 * 10).astype(int)
group = decade.astype(str) + "s, sex " + patients["sex"].astype(int).astype(str)
names, site = np.unique(group, return_inverse=True)
features = ["bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6"]

Path("data").mkdir(exist_ok=True)
np.savez(
    "data/diabetes.npz",
    x=patients[features].to_numpy(np.float32),  # [rows, features], or [rows, height, width] for images
    y=patients["target"].to_numpy(np.float32),  # numbers in their own unit, or class codes
    site=site,  # which site each row belongs to
    site_names=names.astype(str),
    feature_names=np.array(features),
)
print(pd.Series(group).value_counts().to_string())
