"""A federation of plain processes on this machine: SuperLink, gate and egresses with TLS, a SuperNode beside each file.

Where nginx is not installed, nodes call the SuperLink itself.
"""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from ssl import create_default_context

import numpy as np
import pytest

from clients.policy import FILE as POLICY
from fedmeta.certs import make_certs
from fedmeta.runtime import deployment
from fedmeta.runtime.superlink import environment, free_port, keep
from tests.deployment.proxies import HERE, NGINX, proxy

STARTS_S = 60.0
FAST = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1", "OMP_NUM_THREADS": "1"}
INTRUDER = "intruder"
"""A site with keys of the federation's making that no one registers."""

_TLS = {"--ssl-certfile": "tls.crt", "--ssl-keyfile": "tls.key", "--ssl-ca-certfile": "public/ca.crt"}


@dataclass(frozen=True)
class Federation:
    """Where a running federation is.

    Attributes:
        certs: The folder of keys and certificates.
        gate: The port that sites reach.
        ways: The port of each site's egress.
        env: The environment of its processes.
        nodes: The process of each site's SuperNode.
    """

    certs: Path
    gate: int
    ways: Mapping[str, int]
    env: Mapping[str, str]
    nodes: dict[str, subprocess.Popen[bytes]]

    def node(self, site: str, file: Path) -> list[str]:
        """Returns the command of a site's SuperNode."""
        return [
            *self.outsider(site, file),
            "--auth-supernode-private-key",
            str(self.certs / "sites" / site / "node.key"),
        ]

    def outsider(self, site: str, file: Path) -> list[str]:
        """Returns the command of a SuperNode that shows no registered key."""
        return [*self.plain(site, file), "--root-certificates", str(self.certs / "sites" / site / "public" / "ca.crt")]

    @contextmanager
    def forked(self, command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
        """Runs a SuperNode of this command whose app is a separate process, which has torch, as in the compose files.

        Each message then costs a fork where the SuperNode by itself starts a Python that imports torch.
        """
        app = [sys.executable, "-P", "-m", "fedmeta.prefork_superexec", "--insecure"]
        app += ["--runtime-api-address", f"{HERE}:{command[command.index('--port') + 1]}"]
        with (
            keep([*command, "--isolation", "process"], self.env, log) as node,
            keep(app, self.env, log.with_suffix(".app.log")),
        ):
            yield node

    def plain(self, site: str, file: Path) -> list[str]:
        """Returns the command of a SuperNode, without what secures it."""
        return [
            "flower-supernode", "--superlink", f"{HERE}:{self.ways.get(site, self.gate)}", "--port", str(free_port()),
            "--node-config", f'site="{site}" data="{file}"',
        ]  # fmt: skip


def write_sites(folder: Path, sites: int = 3, rows: int = 24) -> dict[str, Path]:
    """Writes one CSV per site, each with the same columns in its order, and a policy that grants tasks of few rows."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / POLICY).write_text("min_support = 1\nmin_query = 1\nmin_test = 1\n")
    random = np.random.default_rng(5)
    columns = ["age", "chol", "label", "pressure"]
    files = {}
    for number in range(sites):
        x = random.normal(number, 1.0, size=(rows, 3))
        label = (x @ [1.0, -1.0, 0.5] + random.normal(0, 0.1, rows) > 0.5 * number).astype(int)
        values = {"age": x[:, 0], "chol": x[:, 1], "pressure": x[:, 2], "label": label}
        order = list(np.roll(columns, number))
        lines = [",".join(order)]
        lines += [",".join(f"{values[name][row]:.6g}" for name in order) for row in range(rows)]
        files[f"site-{number}"] = folder / f"site-{number}.csv"
        files[f"site-{number}"].write_text("\n".join(lines) + "\n")
    return files


@contextmanager
def federation(work: Path, files: Mapping[str, Path], forked: bool = False) -> Iterator[Federation]:
    """Runs a SuperLink, a gate and a SuperNode for each file, and sets the submitter's environment.

    Args:
        work: The folder of keys, logs and state.
        files: Each site's file.
        forked: Whether the nodes' apps are copies of a process that has torch (`Federation.forked`).
    """
    certs = work / "certs"
    make_certs(certs, [HERE], [*files, INTRUDER])
    tls = [part for option, file in _TLS.items() for part in (option, str(certs / "server" / file))]
    port = free_port()
    gate = free_port() if NGINX else port
    ways = {site: free_port() if NGINX else port for site in (*files, INTRUDER)}
    running = Federation(certs, gate, ways, environment(work / "home", FAST), {})
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        command = ["flower-superlink", *tls, "--enable-supernode-auth", "--database", str(work / "state.db")]
        command += ["--host", HERE, "--port", str(port), "--disable-runtime-dependency-installation"]
        link = stack.enter_context(keep(command, running.env, work / "superlink.log"))
        _await_health(port, certs / "ca.crt", link)
        if NGINX:
            stack.enter_context(proxy("gate.conf", certs / "server", gate, port, work))
            for site, way in ways.items():
                stack.enter_context(proxy("egress.conf", certs / "sites" / site, way, gate, work))
        patch.setenv(deployment.SUPERLINK, f"{HERE}:{port}")
        patch.setenv(deployment.ROOT_CERTIFICATES, str(certs / "ca.crt"))
        register([certs / "sites" / site / "node.pub" for site in files])
        for site, file in files.items():
            command, log = running.node(site, file), work / f"{site}.log"
            node = running.forked(command, log) if forked else keep(command, running.env, log)
            running.nodes[site] = stack.enter_context(node)
        yield running


def register(keys: list[Path]) -> None:
    """Registers public keys of nodes at the SuperLink that the environment names."""
    command = [sys.executable, "-m", "fedmeta", "flower", "supernode", "register"]
    calls = [subprocess.Popen([*command, str(key)], stdout=subprocess.DEVNULL) for key in keys]
    assert [call.wait(STARTS_S) for call in calls] == [0] * len(calls)


def _await_health(port: int, certificate: Path, process: subprocess.Popen[bytes]) -> None:
    """Waits until the SuperLink answers over TLS."""
    context = create_default_context(cafile=str(certificate))
    deadline = time.monotonic() + STARTS_S
    while True:
        try:
            urllib.request.urlopen(f"https://{HERE}:{port}/health", timeout=2.0, context=context).close()
            return
        except OSError:
            assert process.poll() is None, "the SuperLink has ended"
            assert time.monotonic() < deadline, "the SuperLink does not answer"
            time.sleep(0.2)
