"""Log probabilities and several answers: beside the text, and without any change of it."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import numpy as np
import openai
import pytest

from pipeline.runtime.sessions.torch_session import TorchSession
from pipeline.serve.job import Ending
from pipeline.serve.log_probs import ScoredText, Scorer, TokenScore
from pipeline.serve.reply import Reply
from tests.support.live_server import MODEL, LiveServer, alone
from tests.support.tiny_decoder import VOCAB_SIZE, byte_tokenizer, tiny_llama

CHAT: list[Any] = [{"role": "user", "content": "hello"}]
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0}
DRAWN: dict[str, Any] = {"model": MODEL, "temperature": 1.5, "seed": 7, "max_tokens": 12}


@pytest.fixture(scope="module")
def client(served: LiveServer) -> openai.OpenAI:
    return served.client()


def expected_log_probs(prompt: str, count: int) -> tuple[list[int], np.ndarray]:
    """The greedy tokens after a prompt, and all log probabilities of each, by another way."""
    ids = byte_tokenizer().encode(prompt)
    rows = []
    for _ in range(count):
        block = TorchSession(tiny_llama()).forward(np.array([ids]))
        logits = block.reshape(-1, VOCAB_SIZE)[-1].astype(np.float64)
        rows.append(logits - np.logaddexp.reduce(logits))
        ids.append(int(logits.argmax()))
    return ids[-count:], np.stack(rows)


def test_log_probabilities_are_those_of_the_model(client: openai.OpenAI) -> None:
    tokens, rows = expected_log_probs("abc", 6)
    result = client.completions.create(prompt="abc", max_tokens=6, logprobs=2, **GREEDY)
    [choice] = result.choices
    assert choice.text == alone("abc", 6)
    scores = choice.logprobs
    assert scores is not None
    assert scores.token_logprobs is not None
    assert scores.top_logprobs is not None
    # Logits in one batch and in several differ by rounding of float32.
    chosen = rows[np.arange(6), tokens]
    np.testing.assert_allclose(np.array(scores.token_logprobs, float), chosen, atol=1e-4)
    for row, likeliest in zip(rows, scores.top_logprobs, strict=True):
        best = np.sort(row)[::-1][: len(likeliest)]
        np.testing.assert_allclose(sorted(likeliest.values(), reverse=True), best, atol=1e-4)


def test_a_chat_shows_every_token_in_a_stream_as_in_one_piece(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = GREEDY | {"messages": CHAT, "max_tokens": 20}
    plain = client.chat.completions.create(**settings)
    wanted = settings | {"logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**wanted).choices[0]
    assert whole.message.content == plain.choices[0].message.content
    assert plain.choices[0].logprobs is None
    assert whole.logprobs is not None
    content = whole.logprobs.content
    assert content is not None
    assert len(content) == 20
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == token.logprob  # greedy takes the likeliest
        assert token.bytes is None or bytes(token.bytes).decode() == token.token
    streamed = [
        token
        for chunk in client.chat.completions.create(stream=True, **wanted)
        if chunk.choices and chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content or []
    ]
    assert streamed == content


def test_drawn_tokens_are_the_same_with_log_probabilities(client: openai.OpenAI) -> None:
    plain = client.completions.create(prompt="abc", **DRAWN)
    scored = client.completions.create(prompt="abc", logprobs=0, **DRAWN)
    assert scored.choices[0].text == plain.choices[0].text
    assert scored.choices[0].logprobs is not None
    assert scored.choices[0].logprobs.top_logprobs is None
    offsets = scored.choices[0].logprobs.text_offset
    assert offsets is not None
    assert offsets[0] == 0
    assert offsets == sorted(offsets)


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_are_drawn_apart_and_the_first_as_if_alone(
    client: openai.OpenAI, stream: bool
) -> None:
    only = client.completions.create(prompt="abc", **DRAWN).choices[0].text
    result: Any = client.completions.create(prompt="abc", n=5, stream=stream, **DRAWN)
    texts = [""] * 5
    for part in list(result) if stream else [result]:
        for choice in part.choices:
            texts[choice.index] += choice.text
    assert texts[0] == only
    assert len(set(texts)) > 1
    again = client.completions.create(prompt="abc", n=5, **DRAWN)
    assert [choice.text for choice in again.choices] == texts
    assert again.usage is not None
    assert again.usage.prompt_tokens == 3
    assert 12 < again.usage.completion_tokens <= 60


def test_more_answers_than_slots_stream_to_the_end(served: LiveServer) -> None:
    chunks = list(
        served.client().chat.completions.create(
            messages=CHAT,
            n=7,
            max_tokens=100,
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
    )
    texts = [""] * 7
    reasons: list[str | None] = [None] * 7
    for chunk in chunks[:-1]:
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [alone(CHAT, 100)] * 7
    assert None not in reasons
    assert chunks[-1].usage is not None
    load = served.scheduler.load()
    assert (load.running, load.waiting) == (0, 0)


def test_a_token_that_cannot_come_has_a_number_all_the_same() -> None:
    pieces: list[ScoredText] = []
    scorer = Scorer(pieces.append, byte_tokenizer(), 3)
    scorer.watch(5, np.array([-np.inf] * 5 + [1.0], np.float32))
    scorer.finish()
    [piece] = pieces
    assert piece.scores[0].log_prob == 0
    assert [value for _, value in piece.scores[0].likeliest] == [0.0, -9999.0, -9999.0]


def test_an_event_is_one_line_for_every_reader_of_lines() -> None:
    text = "a\x85b\u2028c\u2029d\x0be\x0cf\x1cg"
    reply = Reply("m\u2028n", True, 1, include_usage=True, alternatives=1)
    scored = ScoredText(text, [TokenScore(text, -1.0, ((text, -1.0),))])
    events = reply.opening(0) + reply.piece(0, scored, 0)
    events += reply.closing(0, Ending("stop", 1, 0)) + reply.end([Ending("stop", 1, 0)])
    for event in events.decode().split("\n\n")[:-1]:
        assert event.splitlines() == [event]
    parsed = json.loads(events.decode().split("\n\n")[1].removeprefix("data: "))
    assert parsed["choices"][0]["delta"]["content"] == text
    assert parsed["model"] == "m\u2028n"


def test_a_line_reader_reads_whole_events(served: LiveServer) -> None:
    body = json.dumps(GREEDY | {"prompt": "abc", "max_tokens": 60, "stream": True}).encode()
    request = urllib.request.Request(
        f"{served.url}/v1/completions", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=20) as response:
        lines = [line for line in response.read().decode().splitlines() if line]
    assert lines.pop() == "data: [DONE]"
    texts = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines]
    assert "".join(texts) == alone("abc", 60)
