"""Whatever comes as the body of a request: an answer or a 4xx, soon, and in little memory."""

from __future__ import annotations

import http.client
import json
import random
import time

import pytest

from pipeline.memory import peak_bytes
from tests.pipeline.serve.test_bad_requests import CHAT, TEXT
from tests.support.live_server import MODEL, LiveServer
from tests.support.mutations import mutated

LIMIT_S = 10
MOST_BYTES = 1 << 30
BODIES = {
    CHAT: {
        "model": MODEL, "max_tokens": 2, "temperature": 0.5, "seed": 1, "n": 2, "stop": ["a", "b"],
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        ],
        "logprobs": True, "top_logprobs": 2, "response_format": {"type": "text"}, "stream": False,
    },
    TEXT: {
        "model": MODEL, "max_tokens": 2, "prompt": [[104, 105, 3]], "top_p": 0.9,
        "echo": False, "logprobs": 1, "stream_options": None, "min_p": 0.1,
    },
}  # fmt: skip


def send(server: LiveServer, path: str, body: bytes) -> tuple[int, str]:
    """Status and text of the answer; of one that became a stream, its last event."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    if response.headers["Content-Type"].startswith("text/event-stream"):
        return response.status, text.strip().rpartition("data: ")[2]
    json.loads(text)
    return response.status, text


def hold(server: LiveServer, path: str, seeds: range) -> set[int]:
    body = json.dumps(BODIES[path]).encode()
    seen, before_bytes = set(), peak_bytes()
    assert send(server, path, body)[0] == 200
    for seed in seeds:
        started = time.monotonic()
        status, content = send(server, path, mutated(body, random.Random(seed), True))
        assert status == 200 or 400 <= status < 500, f"{path}, seed {seed}: {content}"
        assert content.startswith("{") or content == "[DONE]", f"{path}, seed {seed}: {content}"
        assert time.monotonic() - started < LIMIT_S, f"{path}, seed {seed}"
        seen.add(status)
    assert peak_bytes() - before_bytes < MOST_BYTES
    assert send(server, path, body)[0] == 200
    return seen


@pytest.mark.parametrize("path", BODIES)
def test_a_mutated_request_gets_an_answer_or_is_refused(served: LiveServer, path: str) -> None:
    assert {200, 400} <= hold(served, path, range(100))


@pytest.mark.slow
@pytest.mark.parametrize("path", BODIES)
def test_a_request_mutated_in_thousands_of_ways_gets_an_answer_or_is_refused(
    served: LiveServer, path: str
) -> None:
    hold(served, path, range(1000, 3000))
