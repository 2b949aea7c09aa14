"""A federation of plain processes on this machine: SuperLink with TLS and node keys, SuperNodes beside a file each."""

from __future__ import annotations

import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from ssl import create_default_context

import numpy as np
import pytest

from fedmeta.certs import make_certs
from fedmeta.runtime import deployment
from fedmeta.runtime.superlink import environment, free_port, keep

HERE = "127.0.0.1"
STARTS_S = 60.0
FAST = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1", "OMP_NUM_THREADS": "1"}


def write_sites(folder: Path, sites: int = 3, rows: int = 24) -> dict[str, Path]:
    """Writes one CSV per site; each has the same columns in an order of its own."""
    folder.mkdir(parents=True, exist_ok=True)
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
def federation(work: Path, files: Mapping[str, Path], register: Mapping[str, Path] | None = None) -> Iterator[int]:
    """Runs a SuperLink and a SuperNode for each file; yields the port. Sets the submitter's environment."""
    certs = work / "certs"
    make_certs(certs, [HERE], list(files))
    port = free_port()
    env = environment(work / "server-home", FAST)
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        tls = [part for name, file in TLS.items() for part in (name, str(certs / "server" / file))]
        command = ["flower-superlink", *tls, "--enable-supernode-auth", "--database", str(work / "state.db")]
        command += ["--host", HERE, "--port", str(port), "--disable-runtime-dependency-installation"]
        link = stack.enter_context(keep(command, env, work / "superlink.log"))
        await_health(port, certs / "ca.crt", link)
        patch.setenv(deployment.SUPERLINK, f"{HERE}:{port}")
        patch.setenv(deployment.ROOT_CERTIFICATES, str(certs / "ca.crt"))
        with deployment._flower() as (_, client_env):
            keys = [certs / "sites" / site / "node.pub" for site in files]
            calls = [
                subprocess.Popen(["flwr", "supernode", "register", str(key)], env=client_env, stdout=subprocess.DEVNULL)
                for key in keys
            ]
            assert [call.wait(STARTS_S) for call in calls] == [0] * len(calls)
        for site, file in files.items():
            stack.enter_context(keep(node_command(certs, port, site, file), env, work / f"{site}.log"))
        yield port


TLS = {"--ssl-certfile": "tls.crt", "--ssl-keyfile": "tls.key", "--ssl-ca-certfile": "public/ca.crt"}


def node_command(certs: Path, port: int, site: str, file: Path) -> list[str]:
    """Returns the command of a site's SuperNode."""
    folder = certs / "sites" / site
    return [
        "flower-supernode", "--superlink", f"{HERE}:{port}", "--root-certificates", str(folder / "public" / "ca.crt"),
        "--auth-supernode-private-key", str(folder / "node.key"), "--port", str(free_port()),
        "--node-config", f'site="{site}" data="{file}"',
    ]  # fmt: skip


def await_health(port: int, certificate: Path, process: subprocess.Popen[bytes]) -> None:
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
