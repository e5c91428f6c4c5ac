"""Whatever is wrong with a request, it gets a 4xx in OpenAI's shape, and the server lives on."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from pipeline.serve.app import Limits
from tests.support.live_server import MODEL, LiveServer, alone, live_server
from tests.support.tiny_decoder import MAX_LENGTH

MAX_BODY_BYTES = 4096
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def strict(folder: Path) -> Iterator[LiveServer]:
    limits = Limits(max_body_bytes=MAX_BODY_BYTES, max_new_tokens=32, client_timeout_s=10)
    with live_server(folder, slots=2, limits=limits) as server:
        yield server


def exchange(
    server: LiveServer,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, dict[str, Any], dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    if headers is None:
        headers = {"Content-Type": "application/json"}
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, content, {k.lower(): v for k, v in response.getheaders()}


def require_error(content: dict[str, Any]) -> dict[str, Any]:
    error = content["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def chat(**fields: Any) -> bytes:
    return json.dumps({"model": MODEL, "messages": USER, "max_tokens": 2} | fields).encode()


def text(**fields: Any) -> bytes:
    return json.dumps({"model": MODEL, "prompt": "hi", "max_tokens": 2} | fields).encode()


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        (CHAT, b"", 400, None),
        (CHAT, b"{", 400, None),
        (CHAT, b"\xff\xfe", 400, None),
        (CHAT, b"[]", 400, None),
        (CHAT, b"null", 400, None),
        (CHAT, b"[" * 2000, 400, None),
        (CHAT, b'{"model": "\\ud800"}', 400, None),
        (CHAT, b"{}", 400, "model"),
        (CHAT, chat(model=7), 400, "model"),
        (CHAT, chat(model="other"), 404, "model"),
        (CHAT, chat(messages=[]), 400, "messages"),
        (CHAT, chat(messages="hi"), 400, "messages"),
        (CHAT, chat(messages=[{"role": "user"}]), 400, "messages.0.content"),
        (CHAT, chat(messages=[{"role": "tool", "content": "x"}]), 400, "messages.0.role"),
        (CHAT, chat(messages=[{"role": "user", "content": None}]), 400, "messages.0.content"),
        (
            CHAT,
            chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
            400,
            "messages.0.content",
        ),
        (
            CHAT,
            chat(messages=[{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]),
            400,
            "messages[0].tool_calls",
        ),
        (CHAT, chat(messages=[{**USER[0], "name": "x"}]), 400, "messages[0].name"),
        (CHAT, chat(messages=[{"role": "user", "content": "x" * 1000}]), 400, "messages"),
        (CHAT, chat(max_tokens=0), 400, "max_tokens"),
        (CHAT, chat(max_tokens=-5), 400, "max_tokens"),
        (CHAT, chat(max_tokens=2.5), 400, "max_tokens"),
        (CHAT, chat(max_tokens="2"), 400, "max_tokens"),
        (CHAT, chat(max_tokens=True), 400, "max_tokens"),
        (CHAT, chat(max_tokens=33), 400, "max_tokens"),
        (CHAT, chat(max_tokens=10**30), 400, "max_tokens"),
        (CHAT, chat(max_tokens=None, max_completion_tokens=33), 400, "max_completion_tokens"),
        (CHAT, chat(max_completion_tokens=3), 400, "max_tokens"),
        (CHAT, chat(temperature=-1), 400, "temperature"),
        (CHAT, chat(temperature=2.1), 400, "temperature"),
        (CHAT, chat(temperature=1e-300), 400, "temperature"),
        (CHAT, chat(temperature="hot"), 400, "temperature"),
        (CHAT, chat().replace(b'"max_tokens"', b'"temperature": NaN, "a"'), 400, "temperature"),
        (CHAT, chat(top_p=0), 400, "top_p"),
        (CHAT, chat(top_p=1.5), 400, "top_p"),
        (CHAT, chat(top_k=-2), 400, "top_k"),
        (CHAT, chat(min_p=2), 400, "min_p"),
        (CHAT, chat(repetition_penalty=0), 400, "repetition_penalty"),
        (CHAT, chat(noise="pink"), 400, "noise"),
        (CHAT, chat(seed="x"), 400, "seed"),
        (CHAT, chat(seed=2**64), 400, "seed"),
        (CHAT, chat(stop=["a", "b", "c", "d", "e"]), 400, "stop"),
        (CHAT, chat(stop=""), 400, "stop"),
        (CHAT, chat(stop=[1]), 400, "stop"),
        (CHAT, chat(stream="yes"), 400, "stream"),
        (CHAT, chat(stream_options={"include_usage": True}), 400, "stream_options"),
        (CHAT, chat(stream=True, stream_options={"x": 1}), 400, "stream_options"),
        (CHAT, chat(n=0), 400, "n"),
        (CHAT, chat(n=129), 400, "n"),
        (CHAT, chat(n=100), 400, "n"),
        (CHAT, chat(n=True), 400, "n"),
        (CHAT, chat(logit_bias={"5": 1}), 400, "logit_bias"),
        (CHAT, chat(logprobs=2), 400, "logprobs"),
        (CHAT, chat(logprobs=True, top_logprobs=21), 400, "top_logprobs"),
        (CHAT, chat(top_logprobs=3), 400, "top_logprobs"),
        (CHAT, chat(presence_penalty=0.5), 400, "presence_penalty"),
        (CHAT, chat(frequency_penalty=0.5), 400, "frequency_penalty"),
        (CHAT, chat(tools=[{"type": "function"}]), 400, "tools"),
        (CHAT, chat(tool_choice="required"), 400, "tool_choice"),
        (CHAT, chat(response_format={"type": "xml"}), 400, "response_format"),
        (CHAT, chat(response_format={"type": "json_schema"}), 400, "response_format"),
        (CHAT, chat(response_format={"type": "text", "x": 1}), 400, "response_format"),
        (TEXT, text(response_format={"type": "json_object"}), 400, "response_format"),
        (CHAT, chat(unheard_of=1), 400, "unheard_of"),
        (TEXT, b'{"model": "tiny"}', 400, "prompt"),
        (TEXT, text(prompt=""), 400, "prompt"),
        (TEXT, text(prompt=[]), 400, "prompt"),
        (TEXT, text(prompt=["a", "b"]), 400, "prompt"),
        (TEXT, text(prompt=[[1], [2]]), 400, "prompt"),
        (TEXT, text(prompt=[1, "a"]), 400, "prompt"),
        (TEXT, text(prompt=[-1]), 400, "prompt"),
        (TEXT, text(prompt=[10**9]), 400, "prompt"),
        (TEXT, text(prompt=[[]]), 400, "prompt"),
        (TEXT, text(prompt=7), 400, "prompt"),
        (TEXT, text(prompt="x" * (MAX_LENGTH + 1)), 400, "prompt"),
        (TEXT, text(echo=True), 400, "echo"),
        (TEXT, text(suffix="x"), 400, "suffix"),
        (TEXT, text(best_of=2), 400, "best_of"),
        (TEXT, text(logprobs=6), 400, "logprobs"),
        (TEXT, text(logprobs=True), 400, "logprobs"),
    ],
)
def test_a_bad_body_is_refused_naming_the_field(
    strict: LiveServer, path: str, body: bytes, status: int, param: str | None
) -> None:
    observed, content, _ = exchange(strict, "POST", path, body)
    error = require_error(content)
    assert (observed, error["param"]) == (status, param), error
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/v1/../etc/passwd", 404),
        ("GET", CHAT, 405),
        ("POST", "/v1/models", 405),
        ("DELETE", "/health", 405),
    ],
)
def test_unknown_routes_and_wrong_methods_are_told_as_json(
    strict: LiveServer, method: str, path: str, status: int
) -> None:
    observed, content, headers = exchange(
        strict, method, path, chat() if method == "POST" else None
    )
    require_error(content)
    assert observed == status
    assert status != 405 or headers["allow"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "json", None])
def test_another_content_type_is_refused(strict: LiveServer, kind: str | None) -> None:
    headers = {"Content-Type": kind} if kind else {}
    status, content, _ = exchange(strict, "POST", CHAT, chat(), headers)
    assert status == 415
    require_error(content)


def test_the_charset_may_be_named(strict: LiveServer) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert exchange(strict, "POST", CHAT, chat(), headers)[0] == 200


@pytest.mark.parametrize("size_bytes", [MAX_BODY_BYTES + 1, 7 * MAX_BODY_BYTES])
def test_a_body_that_is_too_long_is_refused(strict: LiveServer, size_bytes: int) -> None:
    body = chat(user="x" * size_bytes)
    status, content, _ = exchange(strict, "POST", CHAT, body)
    assert status == 413
    require_error(content)


def test_a_chunked_body_is_measured_as_it_comes(strict: LiveServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", strict.port, timeout=20)
    parts = (b" " * 1000 for _ in range(20))
    headers = {"Content-Type": "application/json"}
    connection.request("POST", CHAT, parts, headers, encode_chunked=True)
    response = connection.getresponse()
    assert response.status == 413
    require_error(json.loads(response.read()))


def test_a_client_that_asks_first_need_not_send_what_is_too_long(strict: LiveServer) -> None:
    with strict.connect() as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: [::1]:80\r\nContent-Type: application/json\r\n"
            b"Expect: 100-continue\r\nContent-Length: 99999999\r\n\r\n"
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: t\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
    ],
)
def test_what_is_not_http_gets_a_400(strict: LiveServer, garbage: bytes) -> None:
    with strict.connect() as connection:
        connection.sendall(garbage + b"\r\n\r\n")
        answer = b""
        try:
            while part := connection.recv(10_000):
                answer += part
        except ConnectionResetError:
            assert len(garbage) > 100_000  # the rest of it was never read
    assert answer.startswith(b"HTTP/1.1 400 ") or len(garbage) > 100_000
    if answer:
        require_error(json.loads(answer.partition(b"\r\n\r\n")[2]))


def test_the_official_client_raises_its_own_errors(strict: LiveServer) -> None:
    client = strict.client()
    message: Any = [{"role": "user", "content": "hi"}]
    with pytest.raises(openai.BadRequestError, match="not support logit_bias"):
        client.chat.completions.create(model=MODEL, messages=message, logit_bias={"5": 1})
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here"):
        client.chat.completions.create(model="gpt", messages=message)


def test_after_all_that_the_server_answers_as_before(strict: LiveServer) -> None:
    status, content, _ = exchange(strict, "POST", TEXT, text(max_tokens=8, temperature=0))
    assert status == 200
    assert content["choices"][0]["text"] == alone("hi", 8)
    status, content, _ = exchange(strict, "GET", "/health")
    assert status == 200
    assert content == {"status": "ok", "running": 0, "waiting": 0, "slots": 2, "queue": 64}


def test_without_one_of_the_keys_there_is_a_401(folder: Path) -> None:
    with live_server(folder, keys=("first", "sécond")) as server:
        for key in ("none", "", "second", "first "):
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}x"}
            status, content, answered = exchange(server, "POST", TEXT, text(), headers)
            assert status == 401
            require_error(content)
            assert answered["www-authenticate"] == "Bearer"
        assert exchange(server, "GET", "/v1/models")[0] == 401
        assert exchange(server, "GET", "/health")[0] == 200
        assert server.client(api_key="first").models.list().data
        with pytest.raises(openai.AuthenticationError):
            server.client(api_key="wrong").models.list()
