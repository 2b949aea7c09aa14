"""Times a deployed round: sites whose messages get copies of a process that has torch, and sites as Flower comes.

    python -m experiments.benchmarks.deployed --sites 2

Runs a SuperLink, nodes and SuperExecs as processes of this machine, in plain text, and MAML over them, by turns with
`fedmeta.prefork_superexec` and with `flower-superexec`; prints the median seconds of a round and their ratio. The
first round
of a run is left out: torch is imported meanwhile.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from fedmeta import load_experiment, run
from fedmeta.progress import Progress
from fedmeta.runtime.deployment import PLAIN_TEXT, ROOT_CERTIFICATES, SUPERLINK
from fedmeta.runtime.superlink import answers, environment, free_port, keep, last_log_line
from tests.deployment.processes import HERE, write_sites

EXPERIMENT = """
[data]
source = "tables"
path = "{work}/data"
new_sites = 0
[model]
name = "mlp"
hidden = "8"
[learner]
name = "maml"
[server]
rounds = {rounds}
sites_per_round = 0
wait_for = {sites}
[evaluation]
every = 0
[runtime]
engine = "vmap"
[tracking]
uri = "sqlite:///{work}/mlflow.db"
folder = "{work}/runs"
"""
COMMANDS = {
    "copies": [sys.executable, "-P", "-m", "fedmeta.prefork_superexec"],
    "Flower's processes": ["flower-superexec"],
}
SETTINGS = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2", "OMP_NUM_THREADS": "1"}
"""As in the image."""


def seconds_of_rounds(command: list[str], sites: int, rounds: int) -> list[float]:
    """Returns how long each round but the first took over sites whose SuperExec is a command."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        work = Path(folder)
        env, port = environment(work / "home", SETTINGS), free_port()
        link = f"{HERE}:{port}"
        words = ["flower-superlink", "--insecure", "--host", HERE, "--port", str(port)]
        words += ["--disable-runtime-dependency-installation"]
        if not answers(stack.enter_context(keep(words, env, work / "superlink.log")), port):
            sys.exit(f"the SuperLink does not start: {last_log_line(work / 'superlink.log')}")
        files = write_sites(work / "data", sites)
        for site, file in files.items():
            api = str(free_port())
            words = ["flower-supernode", "--insecure", "--superlink", link, "--isolation", "process", "--host", HERE]
            words += ["--port", api, "--node-config", f'site="{site}" data="{file}"']
            stack.enter_context(keep(words, env, work / f"{site}.log"))
            words = [*command, "--insecure", "--runtime-api-address", f"{HERE}:{api}"]
            stack.enter_context(keep(words, env, work / f"{site}-app.log"))
        names = str([*files]).replace("'", '"')
        (work / "run.toml").write_text(EXPERIMENT.format(work=work, rounds=rounds, sites=names))
        os.environ |= {SUPERLINK: link, ROOT_CERTIFICATES: PLAIN_TEXT}
        over: dict[int, float] = {}

        def note(progress: Progress) -> None:
            over.setdefault(progress.round_number, time.perf_counter())

        run(load_experiment(work / "run.toml"), runtime="deployment", report=note)
        return [over[number] - over[number - 1] for number in range(2, rounds + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--times", type=int, default=2, help="how many runs each way")
    options = parser.parse_args()
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(options.times):
        for name, command in COMMANDS.items():
            taken[name] += seconds_of_rounds(command, options.sites, options.rounds)
    for name, seconds in taken.items():
        print(f"{name}: {median(seconds):.1f} s a round (from {min(seconds):.1f} to {max(seconds):.1f})")
    copies, processes = (median(seconds) for seconds in taken.values())
    print(f"{processes / copies:.1f} times as fast, {options.sites} sites")


if __name__ == "__main__":
    main()
