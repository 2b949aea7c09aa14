"""The door between sites and the SuperLink: `python -m fedmeta.gate --superlink HOST:PORT ...`.

Flower's SuperLink serves three interfaces on one port: one for nodes, which authenticate with registered keys, one for
whoever submits runs and registers keys, and one for the ServerApp. The last two ask nobody who they are. So the
SuperLink itself stays on an inner network, and sites reach it through this door, which passes on the nodes' interface
and nothing else. What passes is encrypted on both sides, and nodes' signatures are checked by the SuperLink as ever.
"""

from __future__ import annotations

import argparse
import re
import ssl
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx
import uvicorn
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

NODES = re.compile(rb"/v1/fleet/[a-z]+(-[a-z]+)*")
"""The paths of the nodes' interface; nothing that a proxy or a server could read as another path."""

LARGEST = 64 << 20
"""The largest request that is passed on (bytes); Flower cuts messages into far smaller ones."""

ANSWERS_S = 60.0
_NOT_PASSED_ON = {
    b"host", b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"upgrade", b"te",
    b"accept-encoding", b"content-encoding",
}  # fmt: skip


class Gate:
    """An ASGI application that passes nodes' requests on to a SuperLink.

    Args:
        client: Speaks with the SuperLink.
    """

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; refuses all that is not of the nodes' interface."""
        if scope["type"] != "http":
            return
        path = bytes(scope["raw_path"])
        if scope["method"] != "POST" or not NODES.fullmatch(path) or scope["query_string"]:
            await _answer(send, 404)
            return
        body = await _body(receive)
        if body is None:
            await _answer(send, 413)
            return
        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in _NOT_PASSED_ON]
        try:
            reply = await self._client.post(path.decode("ascii"), content=body, headers=headers)
        except httpx.HTTPError:
            # Nodes try again where a server is away for a while.
            await _answer(send, 503)
            return
        kept = [(name, value) for name, value in reply.headers.raw if name.lower() not in _NOT_PASSED_ON]
        await _answer(send, reply.status_code, reply.content, kept)


async def _body(receive: Receive) -> bytes | None:
    """Returns a request's body, or None where it is too large."""
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > LARGEST:
            return None
        more = message.get("more_body", False)
    return b"".join(parts)


async def _answer(send: Send, status: int, body: bytes = b"", headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
    await send({"type": "http.response.body", "body": body})


def client_of(superlink: str, certificate: str) -> httpx.AsyncClient:
    """Returns a client of a SuperLink that trusts the federation's authority and nobody else, and no proxy."""
    trust = ssl.create_default_context(cafile=certificate)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    # Bodies pass as they are: httpx would unpack a compressed one, and its header would no longer be true.
    return httpx.AsyncClient(
        base_url=f"https://{superlink}",
        verify=trust,
        timeout=ANSWERS_S,
        limits=limits,
        trust_env=False,
        headers={"accept-encoding": "identity"},
    )


def serve_health(address: str) -> grpc.Server:
    """Starts a health server of gRPC's protocol; returns it, for it ends with its last reference."""
    server = grpc.server(ThreadPoolExecutor(max_workers=1))
    servicer = health.HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    server.add_insecure_port(address)
    server.start()
    return server


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the door until it is told to end."""
    parser = argparse.ArgumentParser(prog="fedmeta.gate", description="Passes nodes' requests on to a SuperLink.")
    parser.add_argument("--superlink", default="superlink:8000", help="HOST:PORT of the SuperLink")
    parser.add_argument("--host", default="0.0.0.0", help="the address to listen on")
    parser.add_argument("--port", type=int, default=8443, help="the port to listen on")
    parser.add_argument("--ssl-certfile", required=True, help="the server's certificate")
    parser.add_argument("--ssl-keyfile", required=True, help="its key")
    parser.add_argument("--ssl-ca-certfile", required=True, help="the federation's authority, ca.crt")
    parser.add_argument(
        "--health-server-address", default="127.0.0.1:9095", help="where gRPC health probes are answered"
    )
    options = parser.parse_args(arguments)
    health_server = serve_health(options.health_server_address)
    uvicorn.run(
        Gate(client_of(options.superlink, options.ssl_ca_certfile)),
        host=options.host,
        port=options.port,
        ssl_certfile=options.ssl_certfile,
        ssl_keyfile=options.ssl_keyfile,
        access_log=False,
        lifespan="off",
        server_header=False,
    )
    health_server.stop(None)


if __name__ == "__main__":
    main()
