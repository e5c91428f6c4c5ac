"""The official client against the server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from pipeline.runtime.sampling import Sampling
from tests.support.live_server import MODEL, LiveServer, alone
from tests.support.tiny_decoder import MAX_LENGTH

CHAT: list[Any] = [{"role": "system", "content": "S"}, {"role": "user", "content": "hello"}]
CHAT_TEXT = "<system>S\n<user>hello\n<assistant>"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0}


@pytest.fixture(scope="module")
def client(served: LiveServer) -> openai.OpenAI:
    return served.client()


def test_the_model_is_listed_and_found_by_name(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")


def test_a_chat_is_answered_as_run_answers_it(client: openai.OpenAI) -> None:
    result = client.chat.completions.create(messages=CHAT, max_tokens=12, **GREEDY)
    assert result.object == "chat.completion"
    assert result.model == MODEL
    [choice] = result.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == alone(CHAT, 12)
    assert choice.finish_reason == "length"
    assert result.usage is not None
    assert result.usage.prompt_tokens == len(CHAT_TEXT)
    assert result.usage.completion_tokens == 12
    assert result.usage.total_tokens == len(CHAT_TEXT) + 12


def test_an_answer_can_be_sent_back_as_the_client_holds_it(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(messages=CHAT, max_tokens=5, **GREEDY)
    message = first.choices[0].message
    messages = [*CHAT, message, {"role": "user", "content": "and?"}]
    second = client.chat.completions.create(messages=messages, max_tokens=5, **GREEDY)
    plain = [*CHAT, {"role": "assistant", "content": message.content}, messages[-1]]
    assert second.choices[0].message.content == alone(plain, 5)
    dumped: Any = [*CHAT, message.model_dump(), messages[-1]]  # with every field, null or empty
    third = client.chat.completions.create(messages=dumped, max_tokens=5, **GREEDY)
    assert third.choices[0].message.content == second.choices[0].message.content


def test_a_streamed_chat_is_the_same_text_in_pieces(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(messages=CHAT, max_tokens=20, stream=True, **GREEDY)
    )
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == alone(CHAT, 20)
    assert sum(map(bool, pieces)) > 3
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_is_streamed_last_when_it_is_asked_for(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            messages=CHAT,
            max_completion_tokens=7,
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 7
    assert chunks[-2].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks[:-1])


@pytest.mark.parametrize("prompt", ["abc", ["abc"], [97, 98, 99], [[97, 98, 99]]])
def test_a_prompt_is_completed_in_each_of_its_forms(client: openai.OpenAI, prompt: Any) -> None:
    result = client.completions.create(prompt=prompt, max_tokens=9, **GREEDY)
    if prompt != "abc" and not isinstance(prompt[0], str):
        assert result.usage is not None
        assert result.usage.prompt_tokens == 3
        return
    assert result.object == "text_completion"
    assert result.choices[0].text == alone("abc", 9)


def test_a_streamed_completion_is_the_same_text_in_pieces(client: openai.OpenAI) -> None:
    stream = client.completions.create(prompt="abc", max_tokens=20, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in stream) == alone("abc", 20)


def test_a_completion_without_a_limit_has_16_tokens(client: openai.OpenAI) -> None:
    usage = client.completions.create(prompt="abc", **GREEDY).usage
    assert usage is not None
    assert usage.completion_tokens == 16


def test_the_answer_ends_where_the_context_does(client: openai.OpenAI) -> None:
    result = client.completions.create(prompt="a" * 150, max_tokens=1000, **GREEDY)
    assert result.choices[0].finish_reason == "length"
    assert result.usage is not None
    # The last token is chosen and never fed.
    assert result.usage.total_tokens == MAX_LENGTH + 1


@pytest.mark.parametrize("noise", ["uniform", "gumbel"])
def test_a_seed_fixes_what_is_drawn_and_equals_run(client: openai.OpenAI, noise: str) -> None:
    settings: dict[str, Any] = {"model": MODEL, "temperature": 0.9, "top_p": 0.95, "max_tokens": 24}
    extra = {"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.2, "noise": noise}
    sampling = Sampling(temperature=0.9, top_p=0.95, **extra)  # type: ignore[arg-type]
    texts = {
        seed: client.chat.completions.create(messages=CHAT, seed=seed, extra_body=extra, **settings)
        .choices[0]
        .message.content
        for seed in (1, 2)
    }
    assert texts[1] != texts[2]
    assert texts == {seed: alone(CHAT, 24, sampling, seed) for seed in (1, 2)}


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_before_itself(client: openai.OpenAI, stream: bool) -> None:
    whole = alone("abc", 40)
    stop = whole[10:13]
    expected = whole[: whole.index(stop)]
    result: Any = client.completions.create(
        prompt="abc", max_tokens=40, stop=[stop, "never this"], stream=stream, **GREEDY
    )
    chunks = list(result) if stream else [result]
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_content_in_parts_and_neutral_fields_are_accepted(client: openai.OpenAI) -> None:
    parts: list[Any] = [
        {"role": "developer", "content": "S"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}],
        },
    ]
    result = client.chat.completions.create(
        messages=parts,
        max_tokens=5,
        n=1,
        logprobs=False,
        presence_penalty=0,
        frequency_penalty=0.0,
        user="someone",
        tools=[],
        response_format={"type": "text"},
        **GREEDY,
    )
    assert result.choices[0].message.content == alone(CHAT, 5)


def test_a_following_message_is_read_from_where_the_last_one_ended(served: LiveServer) -> None:
    client = served.client()
    question = "a rather long question, only asked here"
    messages: list[Any] = [{"role": "user", "content": question}]
    first = client.chat.completions.create(messages=messages, max_tokens=8, **GREEDY)
    text = first.choices[0].message.content
    messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "go on"}]
    second = client.chat.completions.create(messages=messages, max_tokens=8, **GREEDY)
    assert second.choices[0].message.content == alone(messages, 8)
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    assert cached >= len(question)


def test_crowded_answers_equal_those_given_alone(served: LiveServer) -> None:
    prompts = [f"{chr(97 + i % 26) * (1 + 7 * i % 90)} {i}" for i in range(36)]
    lengths = [4 + 5 * i % 23 for i in range(36)]
    client = served.client()

    def ask(index: int) -> str:
        stream = client.completions.create(
            prompt=prompts[index], max_tokens=lengths[index], stream=True, **GREEDY
        )
        return "".join(chunk.choices[0].text for chunk in stream)

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(36)))
    assert answers == [alone(p, n) for p, n in zip(prompts, lengths, strict=True)]
    load = served.scheduler.load()
    assert (load.running, load.waiting) == (0, 0)
