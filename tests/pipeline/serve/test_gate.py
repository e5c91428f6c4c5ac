"""Who is answered: names, origins, and clients at the edges of HTTP."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.serve.gate import Callers, host_name, is_origin
from tests.support.live_server import MODEL, LiveServer, eventually, live_server, send_json

BODY = {"model": MODEL, "prompt": "abc", "max_tokens": 3, "temperature": 0}
PAGE = "https://app.example"


@pytest.fixture(scope="module")
def open_to_page(folder: Path) -> Iterator[LiveServer]:
    with live_server(folder, allowed_hosts=("Models.Lan",), cors_origins=(PAGE,)) as server:
        yield server


def exchange(server: LiveServer, content: bytes, shut: bool = False) -> bytes:
    """Everything that a bare connection gets."""
    with server.connect() as connection:
        connection.sendall(content)
        if shut:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        while part := connection.recv(10_000):
            received += part
    return received


def get(server: LiveServer, target: str = "/v1/models", *headers: str) -> bytes:
    lines = [f"GET {target} HTTP/1.1", *headers, "Connection: close", "", ""]
    return exchange(server, "\r\n".join(lines).encode())


@pytest.mark.parametrize(
    ("host", "is_answered"),
    [
        ("127.0.0.1", True),
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("192.168.1.7", True),
        ("localhost", True),
        ("LocalHost.:80", True),
        ("skipcat.localhost", True),
        ("evil.example", False),
        ("evil.example:8000", False),
        ("localhost.evil.example", False),
        ("notlocalhost", False),
        ("127.0.0.1.evil.example", False),
        ("127.0.0.1@evil.example", False),
        ("", False),
        ("a b", False),
        ("localhost:x", False),
    ],
)
def test_without_keys_only_names_of_its_own_are_answered(
    served: LiveServer, host: str, is_answered: bool
) -> None:
    received = get(served, "/v1/models", f"Host: {host}")
    assert received.split()[1] == (b"200" if is_answered else b"403")
    if not is_answered:
        assert b'"code":"host_not_allowed"' in received


def test_every_route_looks_at_the_name(served: LiveServer) -> None:
    for path in ("/health", "/v1/models", "/nowhere"):
        assert b" 403 " in get(served, path, "Host: evil.example")[:20]
    content = send_json("/v1/completions", BODY).replace(b"localhost", b"evil.example", 1)
    assert b" 403 " in exchange(served, content.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))


def test_a_whole_uri_is_a_path_and_a_name(served: LiveServer) -> None:
    assert b" 200 " in get(served, "http://127.0.0.1:80/v1/models", "Host: 127.0.0.1")[:20]
    assert b" 403 " in get(served, "http://evil.example/v1/models", "Host: 127.0.0.1")[:20]
    assert b" 404 " in get(served, "http://127.0.0.1", "Host: 127.0.0.1")[:20]


def test_names_that_are_allowed_are_answered(open_to_page: LiveServer) -> None:
    assert b" 200 " in get(open_to_page, "/health", "Host: models.lan:80")[:20]
    assert b" 403 " in get(open_to_page, "/health", "Host: other.lan")[:20]
    assert Callers(frozenset("*")).allow_host("evil.example")


def test_with_keys_any_name_is_answered_unless_some_are_given(folder: Path) -> None:
    with live_server(folder, keys=("k",)) as server:
        headers = ("Host: my.server", "Authorization: Bearer k", "Origin: http://my.page")
        assert b" 200 " in get(server, "/v1/models", *headers)[:20]
    with live_server(folder, keys=("k",), allowed_hosts=("my.server",)) as server:
        assert b" 403 " in get(server, "/v1/models", "Host: other", *headers[1:2])[:20]


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://evil.example", b"403"),
        ("null", b"403"),
        ("http://localhost:3000", b"200"),
        (PAGE, b"403"),
    ],
)
def test_pages_from_elsewhere_are_not_answered(
    served: LiveServer, origin: str, status: bytes
) -> None:
    received = get(served, "/v1/models", "Host: 127.0.0.1", f"Origin: {origin}")
    assert received.split()[1] == status
    assert b"access-control" not in received.lower()


def test_pages_that_are_allowed_are_told_so_whatever_the_answer(open_to_page: LiveServer) -> None:
    for path, status in (("/v1/models", b"200"), ("/nowhere", b"404"), ("/v1/completions", b"405")):
        received = get(open_to_page, path, "Host: localhost", f"Origin: {PAGE.upper()}")
        assert received.split()[1] == status
        assert f"access-control-allow-origin: {PAGE.upper()}".encode() in received
        assert b"vary: Origin" in received
    refused = get(open_to_page, "/v1/models", "Host: localhost", "Origin: https://other.example")
    assert refused.split()[1] == b"403"
    assert b"access-control" not in refused.lower()


def test_a_browser_that_asks_first_gets_its_leave(open_to_page: LiveServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", open_to_page.port, timeout=20)
    asked = {
        "Origin": PAGE,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
        "Access-Control-Request-Private-Network": "true",
    }
    connection.request("OPTIONS", "/v1/chat/completions", headers=asked)
    response = connection.getresponse()
    response.read()
    assert response.status == 204
    assert response.headers["Access-Control-Allow-Origin"] == PAGE
    assert "POST" in response.headers["Access-Control-Allow-Methods"]
    assert "x-stainless-os" in response.headers["Access-Control-Allow-Headers"]
    assert response.headers["Access-Control-Allow-Private-Network"] == "true"
    connection.request("OPTIONS", "/v1/models")
    assert connection.getresponse().status == 405


def test_names_and_origins_are_read_as_browsers_write_them() -> None:
    assert host_name("A.Example.:80") == "a.example"
    assert host_name("http://a") is None
    assert all(map(is_origin, ("*", "null", PAGE, "http://localhost:3000", "app://x")))
    assert not any(map(is_origin, ("", "app.example", PAGE + "/", PAGE + "/path", "http://")))


def test_a_client_that_ends_its_side_gets_its_answer(served: LiveServer) -> None:
    received = exchange(served, send_json("/v1/completions", BODY), shut=True)
    assert b"HTTP/1.1 200 " in received
    answer = json.loads(received.rpartition(b"\r\n\r\n")[2])
    assert answer["usage"]["completion_tokens"] == 3
    streamed = exchange(served, send_json("/v1/completions", BODY | {"stream": True}), shut=True)
    assert b"data: [DONE]" in streamed


def test_a_client_that_ends_its_side_in_mid_request_is_let_go(served: LiveServer) -> None:
    assert exchange(served, send_json("/v1/completions", BODY)[:-5], shut=True) == b""
    eventually(lambda: not served.server.server_state.connections)


def test_empty_lines_before_a_request_are_passed_over(served: LiveServer) -> None:
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    last = request + b"Connection: close\r\n\r\n"
    assert exchange(served, b"\r\n\r\n" + last).startswith(b"HTTP/1.1 200 ")
    assert exchange(served, request + b"\r\n\r\n" + last).count(b"HTTP/1.1 200 ") == 2


@pytest.mark.parametrize(
    "header", ["Content-Encoding: gzip", "Content-Type: application/json; charset=latin-1"]
)
def test_a_coding_that_is_not_read_is_a_415(served: LiveServer, header: str) -> None:
    content = send_json("/v1/completions", BODY)
    if header.startswith("Content-Type"):
        content = content.replace(b"Content-Type: application/json", header.encode())
    else:
        content = content.replace(b"\r\n", f"\r\n{header}\r\n".encode(), 1)
    received = exchange(served, content.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
    assert received.split()[1] == b"415"


def test_a_byte_order_mark_before_a_body_is_passed_over(served: LiveServer) -> None:
    body = b"\xef\xbb\xbf" + json.dumps(BODY).encode()
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    headers: dict[str, Any] = {"Content-Type": "application/json; charset=UTF-8"}
    connection.request("POST", "/v1/completions", body, headers)
    assert connection.getresponse().status == 200
