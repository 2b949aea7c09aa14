"""Recorded requests of a site: sent again, later, or as another site, to a real SuperLink over TLS."""

from __future__ import annotations

import ssl
import threading
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

import fedmeta
from fedmeta.runtime.superlink import free_port
from tests.deployment.processes import INTRUDER, Federation, federation, register, write_sites
from tests.deployment.proxies import HERE, trust
from tests.deployment.test_processes import EXPERIMENT

SITE = "site-2"
WINDOW_S = 305
"""How old a signed time may be for Flower: 300 s, and 5 s for clocks that differ."""
REPLIES = ("push-messages", "push-object", "confirm-message-received", "send-node-heartbeat")
HOP = {"host", "connection", "content-length", "transfer-encoding", "keep-alive", "date", "server"}


@dataclass(frozen=True)
class Request:
    """A request as it was sent: its path, its headers and its body."""

    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def call(self) -> str:
        return self.path.rsplit("/", 1)[-1]


Send = Callable[[Request], tuple[int, dict[str, str], bytes]]


def sender(port: int, context: ssl.SSLContext) -> Send:
    """Returns a function that sends a request to a port of this machine, and gives status, headers and body."""

    def send(request: Request) -> tuple[int, dict[str, str], bytes]:
        there = urllib.request.Request(
            f"https://{HERE}:{port}{request.path}", request.body, dict(request.headers), method="POST"
        )
        try:
            with urllib.request.urlopen(there, timeout=60, context=context) as answer:
                return answer.status, dict(answer.headers), answer.read()
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), error.read()

    return send


@contextmanager
def recorder(running: Federation, send: Send) -> Iterator[tuple[int, list[Request]]]:
    """Stands between a node and its federation with the server's own certificate, and records what the node sends."""
    recorded: list[Request] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
            request = Request(self.path, headers, body)
            recorded.append(request)
            status, answered, content = send(request)
            self.send_response(status)
            for name, value in answered.items():
                if name.lower() not in HOP:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_request(self, code: object = "-", size: object = "-") -> None:
            del code, size

    port = free_port()
    server = ThreadingHTTPServer((HERE, port), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(running.certs / "server" / "tls.crt", running.certs / "server" / "tls.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield port, recorded
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def signed(request: Request, key: Path, at: datetime) -> Request:
    """Returns a request with a node's signature of another time, as Flower's nodes sign it."""
    private = load_ssh_private_key(key.read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    stamp = at.isoformat()
    signature = private.sign(stamp.encode(), ec.ECDSA(hashes.SHA256()))
    changed = {"flwr-timestamp": stamp, "flwr-signature": b64encode(signature).decode()}
    return replace(
        request, headers={**{k: v for k, v in request.headers.items() if k.lower() not in changed}, **changed}
    )


@pytest.mark.slow
def test_recorded_requests_change_nothing(tmp_path: Path) -> None:
    files = write_sites(tmp_path / "data")
    hosted = {site: file for site, file in files.items() if site != SITE}
    names = str([*files]).replace("'", '"')

    def experiment(folder: str) -> fedmeta.Experiment:
        text = EXPERIMENT.format(
            data=tmp_path / "data", sites=names, store=tmp_path / "mlflow.db", folder=tmp_path / folder
        )
        (tmp_path / f"{folder}.toml").write_text(text)
        return fedmeta.load_experiment(tmp_path / f"{folder}.toml")

    with federation(tmp_path, hosted, forked=True) as running:
        register([running.certs / "sites" / INTRUDER / "node.pub"])
        inside = sender(running.ways[INTRUDER], trust(running.certs))
        with recorder(running, inside) as (port, recorded):
            command = running.node(INTRUDER, files[SITE])
            command[command.index("--superlink") + 1] = f"{HERE}:{port}"
            command[command.index("--node-config") + 1] = f'site="{SITE}" data="{files[SITE]}"'
            with running.forked(command, tmp_path / "recorded.log"):
                first = fedmeta.run(experiment("first"), runtime="deployment")
                replies = [request for request in recorded if request.call in REPLIES]
                assert {request.call for request in replies} >= {"push-messages", "push-object"}

                # Within Flower's window a signature holds for any request of its node: each reply is sent again,
                # all through a second run of the same numbers.
                again: list[int] = []
                ended = threading.Event()

                def replay() -> None:
                    while not ended.is_set():
                        for request in replies:
                            fresh = signed(request, running.certs / "sites" / INTRUDER / "node.key", now())
                            again.append(inside(fresh)[0])
                        time.sleep(0.5)

                thread = threading.Thread(target=replay)
                thread.start()
                try:
                    second = fedmeta.run(experiment("second"), runtime="deployment")
                finally:
                    ended.set()
                    thread.join(60)
        assert len(again) >= len(replies)
        assert 401 not in again, "the replays were authentic"
        assert second.summary["rounds"] == 2
        assert second.summary["failures"] == 0
        assert second.meta_state.keys() == first.meta_state.keys()
        assert all(torch.equal(second.meta_state[name], value) for name, value in first.meta_state.items())
        assert second.sites.drop(columns=[c for c in second.sites if "time" in c]).equals(
            first.sites.drop(columns=[c for c in first.sites if "time" in c])
        )

        # Too old, or from a clock ahead, signed with the right key; and the right time, signed with another site's key.
        (beat, *_) = [request for request in recorded if request.call == "push-messages"]
        key = running.certs / "sites" / INTRUDER / "node.key"
        assert inside(signed(beat, key, now()))[0] != 401
        assert inside(signed(beat, key, now() - timedelta(seconds=WINDOW_S)))[0] == 401
        assert inside(signed(beat, key, now() + timedelta(seconds=60)))[0] == 401
        other = running.certs / "sites" / "site-0" / "node.key"
        assert inside(signed(beat, other, now()))[0] == 401
        public = (running.certs / "sites" / "site-0" / "node.pub").read_text()
        assert inside(as_other(signed(beat, other, now()), public))[0] == 401
        assert (
            inside(replace(beat, headers={k: v for k, v in beat.headers.items() if "flwr" not in k.lower()}))[0] == 401
        )


def as_other(request: Request, public: str) -> Request:
    """Returns a request with another node's public key in its header, whose signature it carries."""
    key = load_ssh_public_key(public.encode())
    (name,) = [name for name in request.headers if name.lower() == "flwr-public-key"]
    shown = b64encode(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).decode()
    return replace(request, headers={**request.headers, name: shown})


def now() -> datetime:
    return datetime.now(UTC)
