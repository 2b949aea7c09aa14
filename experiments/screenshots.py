"""Pictures of what people look at: the MLflow UI on runs of five learners, and the report of their comparison.

    python -m experiments.screenshots --out pictures

Runs five learners on the digits with two seeds first, unless --store and --comparison name what there is already. Needs
Chromium.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from urllib.parse import quote

from fedmeta.cli import live
from fedmeta.experiment import load_experiment
from fedmeta.report import write
from fedmeta.search.compare import compare
from fedmeta.tracking.mlflow_client import open_client
from fedmeta.tracking.ui import experiment_link, serving
from tests.tracking.browser import CHROMIUM, Page, browser

ROOT = Path(__file__).parents[1]
LEARNERS = ("local", "fedavg", "fedavg-ft", "maml", "meta-sgd")
SEEDS = 2
EXPERIMENT = "fedmeta"
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
    overrides = [f"tracking.uri={uri}", f"tracking.folder={folder}/fedmeta-runs", "evaluation.every=20"]
    experiment = load_experiment(ROOT / "experiments" / "digits.toml", overrides)
    with live.several(experiment) as report:
        found = compare(experiment, list(LEARNERS), SEEDS, report=report)
    return uri, found.folder


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
    experiment_id = open_client(uri).get_run(runs["maml"]).info.experiment_id
    report = write([str(folder)], out / "report", folder.parent, uri)[0]
    with serving(uri) as server, browser(out / "profile") as page:
        experiment = f"{server.address}/#/experiments/{experiment_id}"
        ids = quote(json.dumps(list(runs.values())))
        kind = "workflowType=machine_learning"
        compare = f"{server.address}/#/compare-runs?runs={ids}&experiments={quote(json.dumps([experiment_id]))}&{kind}"
        pages = {
            "experiment": (experiment_link(server.address, EXPERIMENT), {"final/new_sites_personalized"}, 1500),
            "compare": (compare, {"Comparing"}, 1300),
            "run": (f"{experiment}/runs/{runs['maml']}?{kind}", {"Left behind", "Created"}, 1300),
            "artifacts": (f"{experiment}/runs/{runs['maml']}/artifacts/pictures/sites.png?{kind}", {"sites.png"}, 1300),
            "table": (f"{experiment}/runs/{runs['maml']}/artifacts/per_site.json?{kind}", {"per_site.json"}, 1000),
        }
        dark(page, False)
        chosen = set(options.only.split(",")) if options.only else {*pages, "report", "report-dark"}
        for name, (link, wanted, height) in pages.items():
            if name not in chosen:
                continue
            shoot(page, link, wanted, out / f"{name}.png", 1600, height)
        for name, on in (("report", False), ("report-dark", True)):
            if name not in chosen:
                continue
            dark(page, on)
            shoot(page, report.absolute().as_uri(), {"How to do it again"}, out / f"{name}.png", 1200, 2300)


if __name__ == "__main__":
    main()
