"""What a request costs before it is admitted or refused: bounded, and at nobody else's expense."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from pipeline.runtime.tokenizer import load_tokenizer
from pipeline.serve import server as serve_module
from tests.pipeline.serve.test_life_cycle import LONG, GatedSlots, begin
from tests.support.live_server import MODEL, LiveServer, alone, eventually, live_server
from tests.support.tiny_decoder import MAX_LENGTH

MIB = 1 << 20


def filled(head: bytes, element: bytes, tail: bytes) -> bytes:
    """A body of 1 MiB whose list is full of wrong elements."""
    return head + b",".join([element] * ((MIB - 200) // (len(element) + 1))) + tail


CHAT_HEAD = b'{"model":"tiny","messages":['
PROMPT_HEAD = b'{"model":"tiny","prompt":['
HOSTILE = {
    "objects": filled(PROMPT_HEAD, b"{}", b"]}"),
    "nulls": filled(PROMPT_HEAD, b"null", b"]}"),
    "nested": filled(PROMPT_HEAD, b"[{}]", b"]}"),
    "empty lists": filled(PROMPT_HEAD, b"[]", b"]}"),
    "late": filled(PROMPT_HEAD, b"1", b",{}]}"),
    "texts": filled(PROMPT_HEAD, b'""', b"]}"),
    "messages": filled(CHAT_HEAD, b"{}", b"]}"),
    "numbers": filled(CHAT_HEAD, b"1", b"]}"),
    "parts": filled(CHAT_HEAD + b'{"role":"user","content":[', b"{}", b"]}]}"),
    "stops": filled(b'{"model":"tiny","prompt":"a","stop":[', b"1", b"]}"),
    "fields": b'{"model":"tiny","prompt":"a",%b}'
    % b",".join(b'"a%d":0' % i for i in range(90_000)),
    "options": b'{"model":"tiny","prompt":"a","stream":true,"stream_options":{%b}}'
    % b",".join(b'"a%d":0' % i for i in range(90_000)),
    "field": b'{"model":"tiny","prompt":"a","%b":0}' % (b"x" * (MIB - 100)),
    "model": b'{"model":"%b","prompt":"a"}' % (b"x" * (MIB - 100)),
    "ids": filled(PROMPT_HEAD, b"7", b"]}"),
    "digits": b'{"model":"tiny","prompt":[%b]}' % (b"9" * (MIB - 100)),
}


def post(port: int, body: bytes) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    path = "/v1/chat/completions" if b'"messages"' in body[:50] else "/v1/completions"
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, content


def longest_wait_s(port: int, work: Callable[[], None]) -> float:
    """The longest that /health took while something else was done."""
    is_done = threading.Event()
    waits: list[float] = []

    def watch() -> None:
        while not is_done.is_set():
            started = time.monotonic()
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", "/health")
            connection.getresponse().read()
            waits.append(time.monotonic() - started)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        is_done.set()
        watcher.join()
    return max(waits)


@pytest.fixture(scope="module")
def child(folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server in a process of its own, whose memory is its own."""
    command = ["-m", "pipeline.cli.main", "serve", str(folder), "--port", "0", "--slots", "2"]
    process = subprocess.Popen(
        [sys.executable, *command, "--model-name", MODEL],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert process.stderr is not None
    line = next(line for line in process.stderr if "serving" in line)
    yield process, int(line.rpartition(":")[2].partition("/")[0])
    process.terminate()
    process.communicate(timeout=20)


def peak_bytes(process: subprocess.Popen[str]) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    return next(int(x.split()[1]) for x in status.splitlines() if x.startswith("VmHWM")) << 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_a_mebibyte_of_nonsense_costs_little_and_holds_up_nobody(
    child: tuple[subprocess.Popen[str], int],
) -> None:
    process, port = child
    assert post(port, b'{"model":"tiny","prompt":"abc","max_tokens":2}')[0] == 200
    before = peak_bytes(process)

    def attack() -> None:
        for name, body in HOSTILE.items():
            status, content = post(port, body)
            assert status in (400, 404), name
            assert len(content["error"]["message"]) < 500, name

    assert longest_wait_s(port, attack) < 0.5
    assert peak_bytes(process) - before < 100 << 20


class _SlowTokenizer:
    """The folder's tokenizer, but it takes its time for long texts, as large ones do."""

    def __init__(self, inner: Any, gate: threading.Event) -> None:
        self._inner, self._gate = inner, gate
        self.chat_template = inner.chat_template
        self.read: list[int] = []

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self.read.append(len(text))
        if len(text) > 10_000:
            assert self._gate.wait(30)
        return self._inner.encode(text, add_special_tokens=add_special_tokens)  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        if name == "backend_tokenizer":  # nothing is known of its tokens
            raise AttributeError(name)
        return getattr(self._inner, name)


@pytest.fixture
def slow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_SlowTokenizer]:
    gate = threading.Event()
    tokenizer = _SlowTokenizer(load_tokenizer(folder), gate)
    monkeypatch.setattr(serve_module, "load_tokenizer", lambda folder: tokenizer)
    yield tokenizer
    gate.set()


def test_after_abandoned_long_prompts_a_small_one_is_answered_at_once(
    folder: Path, slow: _SlowTokenizer
) -> None:
    with live_server(folder, slots=1, queue=16) as server:
        long = [begin(server, prompt="x" * 100_000) for _ in range(12)]
        eventually(lambda: server.scheduler._reserved == 12)
        started = time.monotonic()
        result = server.client().completions.create(**LONG | {"max_tokens": 2})
        assert time.monotonic() - started < 1
        assert result.choices[0].text == alone("abc", 2)
        for connection in long:
            connection.close()
        eventually(lambda: server.scheduler._reserved == 0)
        slow._gate.set()
        eventually(lambda: not server.server.server_state.tasks)
        assert slow.read.count(100_000) == 1  # the one that was being read already


def test_prompts_that_are_being_read_have_places_of_the_queue(
    folder: Path, slow: _SlowTokenizer
) -> None:
    with live_server(folder, slots=1, queue=1) as server:
        long = [begin(server, prompt="x" * 100_000) for _ in range(2)]
        eventually(lambda: server.scheduler._reserved == 2)
        with pytest.raises(openai.RateLimitError):
            server.client().completions.create(**LONG)
        for connection in long:
            connection.close()


def test_a_prompt_that_cannot_fit_is_refused_unread(folder: Path) -> None:
    with live_server(folder, slots=1) as server:
        for fields in ({"prompt": "x" * 500_000}, {"prompt": [7] * 300_000}):
            body = json.dumps(LONG | fields).encode()
            started = time.monotonic()
            status, content = post(server.port, body)
            assert time.monotonic() - started < 1
            assert status == 400
            assert content["error"]["code"] == "context_length_exceeded"


def test_reading_that_never_ends_does_not_hold_up_the_end(
    folder: Path, slow: _SlowTokenizer
) -> None:
    with live_server(folder, slots=1, grace_s=0) as server:
        begin(server, prompt="x" * 100_000).close()
        server.server.should_exit = True
        server.thread.join(10)
        assert not server.thread.is_alive()


@pytest.mark.parametrize("digits", [1, 400, 4000])
def test_numbers_beyond_the_context_are_the_context(folder: Path, digits: int) -> None:
    gated = GatedSlots(1)
    with live_server(folder, gated, queue=1) as server:
        connections = [begin(server)]
        eventually(lambda: server.scheduler.load().running == 1)
        most = int("9" * digits)
        connections.append(begin(server, max_tokens=most, top_k=most))
        eventually(lambda: server.scheduler.load().waiting == 1)
        with pytest.raises(openai.RateLimitError):
            server.client().completions.create(**LONG)
        assert server.scheduler._waiting[0].decoding.max_new_tokens == min(most, MAX_LENGTH)
        gated.gate.set()
        for connection in connections:
            connection.close()


class _Panic(BaseException):
    """As panics of libraries in Rust come: no Exception."""


class DyingSlots(GatedSlots):
    """Real slots, until one decodes while the gate is open."""

    def decode(self, slots: Any, tokens: Any) -> Any:
        assert self.gate.wait(30)
        raise _Panic


def test_the_death_of_the_thread_is_heard_by_all(folder: Path) -> None:
    slots = DyingSlots(1)
    with live_server(folder, slots, queue=4) as server:
        answers: list[str] = []

        def ask() -> None:
            try:
                server.client().completions.create(**LONG)
            except openai.InternalServerError as error:
                answers.append(f"{error.status_code} {error.code}")

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        eventually(lambda: server.scheduler.load().waiting == 2)
        slots.gate.set()
        for thread in threads:
            thread.join(20)
        assert answers == ["500 internal_error"] * 3
        server.thread.join(20)
        assert not server.thread.is_alive()
        assert isinstance(server.scheduler.death, _Panic)
        assert not server.scheduler.is_open


def test_a_failing_thread_ends_the_process_with_a_status(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slots = DyingSlots(1)
    slots.gate.set()
    monkeypatch.setattr(serve_module, "open_answering", lambda *arguments: (slots, None))
    statuses: list[int] = []
    announced: list[int] = []
    monkeypatch.setattr(
        serve_module,
        "_announce",
        lambda request, session, listener: announced.append(listener.getsockname()[1]),
    )
    request = serve_module.ServeRequest(folder=folder, port=0, model_name=MODEL)
    thread = threading.Thread(target=lambda: statuses.append(serve_module.serve(request)))
    thread.start()
    eventually(lambda: bool(announced))
    status, content = post(announced[0], b'{"model":"tiny","prompt":"abc"}')
    assert (status, content["error"]["code"]) == (500, "internal_error")
    thread.join(20)
    assert statuses == [1]
    assert "the thread that runs the model has failed" in capsys.readouterr().err


_FAILING = (
    "{% macro deep() %}{{ deep() }}{% endmacro %}"
    "{% if messages[-1].content == 'zero' %}{{ 1 / 0 }}{% endif %}"
    "{% if messages[-1].content == 'deep' %}{{ deep() }}{% endif %}"
    "{% if messages[-1].content == 'index' %}{{ 'a'.index('b') }}{% endif %}"
)


class _Brittle:
    """The folder's tokenizer; some texts make it panic, some its template fail."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.chat_template = inner, _FAILING + inner.chat_template

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        if "panic" in text:
            raise _Panic("regex" * 1000)
        return self._inner.encode(text, add_special_tokens=add_special_tokens)  # type: ignore[no-any-return]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return self._inner.decode(token_ids, skip_special_tokens=skip_special_tokens)  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@pytest.fixture
def brittle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveServer]:
    tokenizer = _Brittle(load_tokenizer(folder))
    monkeypatch.setattr(serve_module, "load_tokenizer", lambda folder: tokenizer)
    with live_server(folder, slots=1) as server:
        yield server


def test_failures_of_a_template_or_a_tokenizer_are_told_as_such(brittle: LiveServer) -> None:
    client = brittle.client()
    for content, code in (
        ("zero", "template_refused"),
        ("deep", "template_refused"),
        ("index", "template_refused"),
        ("panic", "tokenizer_refused"),
    ):
        messages: Any = [{"role": "user", "content": content}]
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=MODEL, messages=messages)
        assert caught.value.code == code
        assert len(caught.value.message) < 1000
    with pytest.raises(openai.BadRequestError, match="tokenizer"):
        client.completions.create(model=MODEL, prompt="panic")
    result = client.completions.create(**LONG | {"max_tokens": 4})
    assert result.choices[0].text == alone("abc", 4)


def test_a_panic_while_an_answer_is_written_fails_this_answer_alone(
    brittle: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder: Any = brittle.scheduler._decoder

    def panic(ids: list[int], **settings: Any) -> str:
        raise _Panic

    with monkeypatch.context() as patch:
        patch.setattr(decoder, "decode", panic)
        with pytest.raises(openai.InternalServerError):
            brittle.client().completions.create(**LONG)
    assert brittle.client().completions.create(**LONG).choices[0].text == alone("abc", 120)
