"""The gate passes on what nodes say and nothing else; `fedmeta.health` tells who is well."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from fedmeta import gate, health
from fedmeta.runtime.superlink import free_port

SECRET = b"x" * 100


class SuperLink:
    """A web application that keeps what it is asked, and answers as it is told."""

    def __init__(self, status: int = 200) -> None:
        self.asked: list[tuple[str, bytes, dict[bytes, bytes]]] = []
        self._status = status

    async def __call__(self, scope: gate.Scope, receive: gate.Receive, send: gate.Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message.get("more_body", False)
        self.asked.append((scope["path"], body, dict(scope["headers"])))
        headers = [(b"content-type", b"application/x-protobuf")]
        await send({"type": "http.response.start", "status": self._status, "headers": headers})
        await send({"type": "http.response.body", "body": SECRET})


def ask(superlink: SuperLink | None, method: str, url: str | httpx.URL, **request: Any) -> httpx.Response:
    """Asks a gate before a SuperLink, or before nobody."""

    async def run() -> httpx.Response:
        inner = httpx.ASGITransport(superlink) if superlink else None
        address = "https://superlink:8000" if superlink else f"http://127.0.0.1:{free_port()}"
        async with httpx.AsyncClient(base_url=address, transport=inner) as client:
            outer = httpx.ASGITransport(gate.Gate(client))
            async with httpx.AsyncClient(transport=outer, base_url="https://gate:8443") as node:
                return await node.request(method, url, **request)

    return asyncio.run(run())


@pytest.mark.parametrize("status", [200, 401])
def test_a_nodes_request_and_its_answer_pass_unchanged(status: int) -> None:
    superlink = SuperLink(status)
    body = bytes(range(256)) * 10_000
    headers = {"x-signature": "abc", "content-type": "application/x-protobuf"}
    answer = ask(superlink, "POST", "/v1/fleet/pull-messages", content=body, headers=headers)
    assert (answer.status_code, answer.content) == (status, SECRET)
    assert answer.headers["content-type"] == "application/x-protobuf"
    ((path, passed, told),) = superlink.asked
    assert (path, passed) == ("/v1/fleet/pull-messages", body)
    assert told[b"x-signature"] == b"abc"
    assert told[b"host"] == b"superlink:8000"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/..%2fcontrol%2fstart-run",
        "/v1/fleet//pull-messages",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/pull-messages?x=1",
        "/V1/fleet/pull-messages",
        "//superlink/v1/control/start-run",
        "/docs",
        "/openapi.json",
        "/",
    ],
)
@pytest.mark.parametrize("method", ["POST", "GET"])
def test_nothing_else_passes(path: str, method: str) -> None:
    superlink = SuperLink()
    url = httpx.URL("https://gate:8443").copy_with(raw_path=path.encode())
    answer = ask(superlink, method, url)
    assert (answer.status_code, answer.content, superlink.asked) == (404, b"", [])


def test_a_body_beyond_bounds_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "LARGEST", 1000)
    superlink = SuperLink()
    answer = ask(superlink, "POST", "/v1/fleet/push-object", content=b"x" * 1001)
    assert (answer.status_code, superlink.asked) == (413, [])


def test_nodes_are_told_to_come_again_where_the_superlink_is_away() -> None:
    answer = ask(None, "POST", "/v1/fleet/pull-messages")
    assert answer.status_code == 503


def test_health_is_told_by_grpc() -> None:
    address = f"127.0.0.1:{free_port()}"
    assert not health.serving(address)
    server = gate.serve_health(address)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(health.serving, address).result(10)
    server.stop(None).wait(5)
    assert not health.serving(address)
