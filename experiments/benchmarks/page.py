"""Times how long the MLflow UI takes to open the page of a run with many sites, in a headless Chromium.

    python -m experiments.benchmarks.page --sites 1000

Runs MAML on that many made-up sites, tracked in its own store, opens the run's page of charts and the experiment's
page several times, and prints the medians in seconds and how many charts of single sites there are. Needs Chromium.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from fedmeta import load_experiment, run
from fedmeta.tracking.mlflow_client import open_client
from fedmeta.tracking.ui import experiment_link, run_link, serving
from tests.tracking.browser import CHROMIUM, Page, browser

EXPERIMENT = """
[data]
source = "synthetic"
sites = {sites}
new_sites = 100
[server]
rounds = 20
[evaluation]
every = 5
[tracking]
uri = "{uri}"
folder = "{folder}"
"""
PATIENCE_S = 60.0
CHARTS = """(document.body.innerText.match(/personalized_accuracy\\s*\\((\\d+)\\)/) || [0, 0])[1]"""
"""How many charts of single sites the section of personalized accuracy holds."""


def seconds_to_open(page: Page, link: str, wanted: set[str]) -> float:
    """Returns how long a page takes to show what it should, opened from an empty one."""
    page.open("about:blank")
    started = time.perf_counter()
    page.open(link, height=2400)
    missing = page.wait_for(wanted, PATIENCE_S)
    if missing:
        page.screenshot(Path("page.png"))
        sys.exit(f"the page lacks {missing}: see page.png")
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=1000)
    parser.add_argument("--times", type=int, default=7, help="how often each page is opened; the median counts")
    parser.add_argument("--picture", type=Path, help="where to put a picture of the run's page")
    options = parser.parse_args()
    if CHROMIUM is None:
        sys.exit("no Chromium here")
    with tempfile.TemporaryDirectory() as work:
        uri = f"sqlite:///{work}/mlflow.db"
        file = Path(work) / "run.toml"
        file.write_text(EXPERIMENT.format(sites=options.sites, uri=uri, folder=f"{work}/runs"))
        run_id = run(load_experiment(file)).summary["run_id"]
        experiment_id = open_client(uri).get_run(run_id).info.experiment_id
        with serving(uri) as server, browser(Path(work) / "profile") as page:
            links = {
                "the run's charts": (
                    run_link(server.address, experiment_id, run_id),
                    {">new_sites", ">personalized_accuracy"},
                ),
                "the experiment": (experiment_link(server.address, "fedmeta"), {"final/new_sites_personalized"}),
            }
            for name, (link, wanted) in links.items():
                first = seconds_to_open(page, link, wanted)
                times = [seconds_to_open(page, link, wanted) for _ in range(options.times)]
                time.sleep(2.0)
                spread = f"from {min(times):.2f} to {max(times):.2f}; the first time {first:.2f}"
                charts = f"{page.evaluate(CHARTS)} charts of single sites out of {options.sites}"
                print(f"{name}: {median(times):.2f} s ({spread}), {charts}")
                if options.picture and name == "the run's charts":
                    page.screenshot(options.picture)


if __name__ == "__main__":
    main()
