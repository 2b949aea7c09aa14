"""Pictures of what people look at: the MLflow UI with two data sets, the report on a screen and a phone, a terminal.

    python -m experiments.screenshots --out pictures

Compares five learners on the digits and two on synthetic sites first, with two seeds each, unless --store and
--comparison name what there is already. Needs Chromium.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

from fedmeta.cli import live
from fedmeta.experiment import Experiment, load_experiment
from fedmeta.report import write
from fedmeta.search.compare import compare
from fedmeta.tracking.mlflow_client import open_client
from fedmeta.tracking.ui import experiment_link, serving
from tests.tracking.browser import CHROMIUM, Page, browser

ROOT = Path(__file__).parents[1]
LEARNERS = ("local", "fedavg", "fedavg-ft", "maml", "meta-sgd")
SEEDS = 2
EXPERIMENT, DATA, MODEL = "fedmeta", "digits", "digits"
PATIENCE_S = 120.0
SETTLES_S = 3.0
"""How long a page takes to draw what has arrived."""
TIDY = """(() => {
    const right = each => each.getBoundingClientRect().right;
    const upper = [...document.querySelectorAll("button")].filter(each => each.getBoundingClientRect().top < 60);
    const last = upper.sort((one, other) => right(one) - right(other)).pop();
    if (document.body.textContent.includes("MLflow Assistant") && last) last.click();
    document.head.insertAdjacentHTML("beforeend", "<style>.modebar { display: none !important }</style>");
})()"""
"""Closes MLflow's side panel, and hides the tools that charts show to who has no mouse."""
LOADING = """document.querySelectorAll('[class*="spin" i], [aria-busy="true"], .anticon-spin').length > 0"""


def compared(folder: Path) -> tuple[str, Path]:
    """Runs the learners; returns the store and the comparison's folder."""
    uri = f"sqlite:///{folder.absolute()}/mlflow.db"
    folder.mkdir(parents=True, exist_ok=True)
    where = [f"tracking.uri={uri}", f"tracking.folder={folder}/fedmeta-runs"]
    digits = [*where, "evaluation.every=20", f"tracking.model={MODEL}"]
    experiment = load_experiment(ROOT / "experiments" / "digits.toml", digits)
    with live.several(experiment) as report:
        found = compare(experiment, list(LEARNERS), SEEDS, report=report)
    other = Experiment().with_overrides([*where, "data.source=synthetic", "data.sites=30", "server.rounds=40"])
    with live.several(other) as report:
        compare(other, list(LEARNERS[2:4]), SEEDS, report=report)
    return uri, found.folder


def terminal(columns: int, runs: Path, out: Path) -> Path:
    """Writes what `fedmeta runs` prints in a terminal of so many columns as a page; returns it."""
    command = [sys.executable, "-m", "fedmeta", "runs", str(runs)]
    environment = {**os.environ, "COLUMNS": str(columns)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    page = out / f"terminal-{columns}.html"
    shown = f"<pre style='width: {columns}ch; border-right: 1px solid'>{html.escape(done.stdout + done.stderr)}</pre>"
    page.write_text(f"<!doctype html><meta charset=utf-8>{shown}", encoding="utf-8")
    return page


def shoot(page: Page, link: str, wanted: set[str], path: Path, width: int, height: int) -> None:
    """Opens a link, waits for what it should show, and takes a picture."""
    page.open(link, width=width, height=height)
    missing = page.wait_for(wanted, PATIENCE_S)
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and page.evaluate(LOADING):
        time.sleep(1.0)
    page.evaluate(TIDY)
    time.sleep(SETTLES_S)
    page.screenshot(path)
    print(path, f"lacks {missing}" if missing else "")


def dark(page: Page, on: bool) -> None:
    """Makes the browser prefer dark pages, or light ones."""
    scheme = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
    page.call("Emulation.setEmulatedMedia", features=[scheme])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("pictures"), help="the folder for the pictures")
    parser.add_argument("--store", help="an MLflow store that has the runs, such as sqlite:////folder/mlflow.db")
    parser.add_argument("--comparison", type=Path, help="the folder of their comparison")
    parser.add_argument("--data", default=DATA, help="the data set that they are of")
    parser.add_argument("--only", help="which pictures, with commas between")
    options = parser.parse_args()
    if CHROMIUM is None:
        sys.exit("no Chromium here")
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    if options.store and options.comparison:
        uri, folder = options.store, options.comparison
    else:
        uri, folder = compared(out / "runs")
    runs = {run["learner"]: run["run_id"] for run in json.loads((folder / "comparison.json").read_text())["runs"]}
    above = json.loads((folder / "mlflow.json").read_text())["run_id"]
    experiment_id = open_client(uri).get_run(runs["maml"]).info.experiment_id
    report = write([str(folder)], out / "report", folder.parent, uri)[0]
    with serving(uri) as server, browser(out / "profile") as page:
        experiment = f"{server.address}/#/experiments/{experiment_id}"
        ids = quote(json.dumps(list(runs.values())))
        kind = "workflowType=machine_learning"
        compare = f"{server.address}/#/compare-runs?runs={ids}&experiments={quote(json.dumps([experiment_id]))}&{kind}"
        pages = {
            "experiment": (
                experiment_link(server.address, EXPERIMENT, options.data),
                {"final/new_sites_personalized"},
                1500,
            ),
            "runs": (experiment_link(server.address, EXPERIMENT, options.data, charts=False), {"compare ·"}, 700),
            "all": (experiment_link(server.address, EXPERIMENT, charts=False), {"compare ·"}, 900),
            "comparison": (f"{experiment}/runs/{above}?{kind}", {"Best for new sites"}, 1300),
            "model": (f"{server.address}/#/models/{MODEL}?{kind}", {"champion"}, 800),
            "compare": (compare, {"Comparing"}, 1300),
            "run": (f"{experiment}/runs/{runs['maml']}?{kind}", {"Left behind", "Created"}, 1300),
            "artifacts": (f"{experiment}/runs/{runs['maml']}/artifacts/pictures/sites.png?{kind}", {"sites.png"}, 1300),
            "table": (f"{experiment}/runs/{runs['maml']}/artifacts/per_site.json?{kind}", {"per_site.json"}, 1000),
        }
        dark(page, False)
        every = {*pages, "report", "report-dark", "report-phone", "terminal"}
        chosen = set(options.only.split(",")) if options.only else every
        for name, (link, wanted, height) in pages.items():
            if name not in chosen:
                continue
            shoot(page, link, wanted, out / f"{name}.png", 1600, height)
        for name, on in (("report", False), ("report-dark", True)):
            if name not in chosen:
                continue
            dark(page, on)
            shoot(page, report.absolute().as_uri(), {"How to repeat it"}, out / f"{name}.png", 1200, 2300)
        dark(page, False)
        if "report-phone" in chosen:
            shoot(page, report.absolute().as_uri(), {"How to repeat it"}, out / "report-phone.png", 390, 3000)
        if "terminal" in chosen:
            shown = terminal(60, folder.parent, out)
            shoot(page, shown.absolute().as_uri(), {"run"}, out / "terminal.png", 700, 900)


if __name__ == "__main__":
    main()
