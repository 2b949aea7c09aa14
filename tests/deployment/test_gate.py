"""nginx before the SuperLink: it passes on what nodes send over a site's certificate, and nothing else."""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from subprocess import Popen
from typing import ClassVar

import pytest

from fedmeta import certs, health
from fedmeta.certs import make_certs, revoke
from fedmeta.runtime import deployment
from fedmeta.runtime.superlink import free_port
from tests.deployment.proxies import HERE, MISSING, NGINX, memory, proxy, trust

pytestmark = pytest.mark.skipif(NGINX is None, reason=MISSING)

PATH = "/v1/fleet/pull-messages"
MIB = 1 << 20


@dataclass
class SuperLink:
    """A web server that keeps what it is asked."""

    asked: list[tuple[str, bytes, dict[str, str]]] = field(default_factory=list)
    status: int = 200

    def handler(self) -> type[BaseHTTPRequestHandler]:
        superlink = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version: ClassVar[str] = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                superlink.asked.append((self.path, body, {k.lower(): v for k, v in self.headers.items()}))
                self.send_response(superlink.status)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", "100")
                self.end_headers()
                self.wfile.write(b"x" * 100)

            do_GET = do_POST  # noqa: N815  (the base class has these names)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@dataclass
class Door:
    """A gate before a made-up SuperLink."""

    certs: Path
    port: int
    superlink: SuperLink
    process: Popen[bytes]

    def site(self, name: str) -> Path:
        return self.certs / "sites" / name

    def connect(self, context: ssl.SSLContext) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(HERE, self.port, context=context, timeout=20)

    def ask(
        self, context: ssl.SSLContext, path: str = PATH, method: str = "POST", body: bytes = b"", **headers: str
    ) -> tuple[int, bytes]:
        connection = self.connect(context)
        try:
            return ask(connection, path, method, body, **headers)
        finally:
            connection.close()


def ask(
    connection: http.client.HTTPSConnection, path: str = PATH, method: str = "POST", body: bytes = b"", **headers: str
) -> tuple[int, bytes]:
    connection.putrequest(method, path, skip_accept_encoding=True)
    for name, value in {**headers, "Content-Length": str(len(body))}.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders(body)
    answer = connection.getresponse()
    return answer.status, answer.read()


def await_true(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    work = tmp_path_factory.mktemp("door")
    certs, link, gate = work / "certs", SuperLink(), free_port()
    make_certs(certs, ["fl.example.org"], ["a", "b", "c"])
    server = ThreadingHTTPServer((HERE, 0), link.handler())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certs / "server" / "tls.crt", certs / "server" / "tls.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with proxy("gate.conf", certs / "server", gate, server.server_port, work) as process:
        yield Door(certs, gate, link, process)
    server.shutdown()


@pytest.fixture
def door(opened: Door) -> Door:
    opened.superlink.asked.clear()
    opened.superlink.status = 200
    return opened


@pytest.mark.parametrize("status", [200, 401])
def test_a_nodes_request_and_its_answer_pass_unchanged(door: Door, status: int) -> None:
    door.superlink.status = status
    body = bytes(range(256)) * 10_000
    answer = door.ask(trust(door.certs, door.site("a")), body=body, x_signature="abc")
    assert answer == (status, b"x" * 100)
    ((path, passed, headers),) = door.superlink.asked
    assert (path, passed, headers["x-signature"]) == (PATH, body, "abc")


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/..%2fcontrol%2fstart-run",
        "/v1/control/../fleet/pull-messages",
        "/v1/%66leet/pull-messages",
        "/v1/fleet//pull-messages",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/pull-messages?x=1",
        "/V1/fleet/pull-messages",
        "//superlink/v1/control/start-run",
        "https://superlink/v1/control/start-run",
        "/health",
        "/docs",
        "/openapi.json",
        "/",
    ],
)
@pytest.mark.parametrize("method", ["POST", "GET"])
def test_nothing_else_passes(door: Door, path: str, method: str) -> None:
    status, _ = door.ask(trust(door.certs, door.site("a")), path, method)
    assert (status, door.superlink.asked) == (404, [])


def test_the_nodes_interface_takes_no_other_method(door: Door) -> None:
    for method in ("GET", "PUT", "DELETE", "OPTIONS", "HEAD"):
        status, _ = door.ask(trust(door.certs, door.site("a")), PATH, method)
        assert (status, door.superlink.asked) == (404, [])


def test_a_body_beyond_bounds_does_not_pass(door: Door) -> None:
    connection = door.connect(trust(door.certs, door.site("a")))
    connection.putrequest("POST", PATH)
    connection.putheader("Content-Length", str(33 * MIB))
    connection.endheaders()
    assert (connection.getresponse().status, door.superlink.asked) == (413, [])
    connection.close()


def test_who_shows_no_certificate_of_the_federation_gets_nowhere(door: Door, tmp_path: Path) -> None:
    assert door.ask(trust(door.certs))[0] == 401
    make_certs(tmp_path / "others", ["fl.example.org"], ["a"])
    assert door.ask(trust(door.certs, tmp_path / "others" / "sites" / "a"))[0] == 401
    # A certificate for a site's inside is none for the gate.
    assert door.ask(trust(door.certs, door.site("a"), "tls"))[0] == 401
    assert door.superlink.asked == []


@pytest.mark.slow
def test_a_revoked_certificate_is_out_at_its_next_message(door: Door) -> None:
    connection = door.connect(trust(door.certs, door.site("b")))
    assert ask(connection)[0] == 200
    revoke(door.certs, ["b"])

    def refused() -> bool:
        try:
            return ask(connection)[0] == 401
        except (http.client.HTTPException, OSError):
            connection.close()
            return False

    await_true(refused, "the refusal")
    assert door.ask(trust(door.certs, door.site("a")))[0] == 200
    make_certs(door.certs, [], ["b"], force=True)
    assert door.ask(trust(door.certs, door.site("b")))[0] == 200


@pytest.mark.slow
def test_a_renewed_certificate_is_shown_without_a_restart(door: Door) -> None:
    def shown() -> str:
        with (
            socket.create_connection((HERE, door.port), timeout=10) as plain,
            trust(door.certs).wrap_socket(plain, server_hostname="gate") as wrapped,
        ):
            return str((wrapped.getpeercert() or {})["serialNumber"])

    before, nginx = shown(), door.process.pid
    make_certs(door.certs, [], [], renew=True)
    await_true(lambda: shown() != before, "the renewal")
    assert door.ask(trust(door.certs, door.site("c")))[0] == 200
    assert (door.process.poll(), door.process.pid) == (None, nginx)


def test_the_days_of_a_certificate_are_a_warning_to_who_connects(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    address, authority = f"{HERE}:{door.port}", str(door.certs / "ca.crt")
    assert deployment.expiry_warning(address, authority) == ""
    monkeypatch.setattr(certs, "WARN_DAYS", 5000)
    assert f"the SuperLink at {address}, or its authority's, ends in 8" in deployment.expiry_warning(address, authority)
    assert deployment.expiry_warning(f"{HERE}:{free_port()}", authority) == ""


def test_idle_clients_cost_little(door: Door) -> None:
    before = memory(door.process)
    held = [socket.create_connection((HERE, door.port), timeout=10) for _ in range(200)]
    try:
        for plain in held[:50]:
            plain.sendall(b"\x16\x03\x01\x02\x00\x01")
        assert door.ask(trust(door.certs, door.site("a")))[0] == 200
        assert memory(door.process) - before < 100 * MIB
    finally:
        for plain in held:
            plain.close()


@pytest.mark.slow
def test_a_sites_way_out_shows_its_certificate(door: Door, tmp_path: Path) -> None:
    port = free_port()
    with proxy("egress.conf", door.site("a"), port, door.port, tmp_path):
        way = Door(door.certs, port, door.superlink, door.process)
        assert way.ask(trust(door.certs), body=b"message") == (200, b"x" * 100)
        assert [(path, body) for path, body, _ in door.superlink.asked] == [(PATH, b"message")]
        assert way.ask(trust(door.certs), "/v1/control/start-run")[0] == 404


def test_nodes_are_asked_to_come_again_where_the_superlink_is_away(door: Door, tmp_path: Path) -> None:
    port = free_port()
    with proxy("gate.conf", door.certs / "server", port, free_port(), tmp_path):
        assert Door(door.certs, port, door.superlink, door.process).ask(trust(door.certs, door.site("a")))[0] == 502
        authority = str(door.certs / "ca.crt")
        assert health.serving(f"https://{HERE}:{port}/", authority)
        assert not health.serving(f"https://{HERE}:{port}/")
        assert not health.serving(f"https://{HERE}:{free_port()}/", authority)
