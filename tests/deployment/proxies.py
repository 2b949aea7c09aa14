"""nginx as the gate and as a site's way out, with docker/'s own configuration, as processes of this machine."""

from __future__ import annotations

import shutil
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import Popen

from fedmeta.health import serving
from fedmeta.runtime.superlink import environment, keep

DOCKER = Path(__file__).parents[2] / "docker"
HERE = "127.0.0.1"
NGINX = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
MISSING = "nginx is not installed: apt-get install nginx-light"
STARTS_S = 30.0


@contextmanager
def proxy(conf: str, certs: Path, port: int, to: int, work: Path) -> Iterator[Popen[bytes]]:
    """Runs docker/proxy.sh, which looks for changed certificates every fifth of a second."""
    log = work / f"{Path(conf).stem}-{port}.log"
    command = ["sh", str(DOCKER / "proxy.sh"), conf, str(certs), f"{HERE}:{port}", f"{HERE}:{to}"]
    with keep(command, environment(work / "home", {"FEDMETA_RELOAD_S": "0.2"}), log) as process:
        deadline = time.monotonic() + STARTS_S
        while not serving(f"https://{HERE}:{port}/", str(certs / "public" / "ca.crt")):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield process


def trust(certs: Path, client: Path | None = None, name: str = "egress") -> ssl.SSLContext:
    """Returns a context that trusts a federation, and shows the certificate in a site's folder where one is given."""
    context = ssl.create_default_context(cafile=str(certs / "ca.crt"))
    if client is not None:
        context.load_cert_chain(client / f"{name}.crt", client / f"{name}.key")
    return context


def memory(process: Popen[bytes]) -> int:
    """Returns the resident memory (bytes) of a process and all that came of it."""
    from fedmeta.runtime.process_guard import descendants

    total = 0
    for pid in [process.pid, *descendants(process.pid)]:
        with suppress(OSError):
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    return total
