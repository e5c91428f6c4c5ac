"""Answers of a form: they parse as what was asked for, however random the model is."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import openai
import pytest

from tests.support.live_server import MODEL, LiveServer, alone

needs_llguidance = pytest.mark.skipif(
    importlib.util.find_spec("llguidance") is None, reason="llguidance is not installed"
)
CHAT: list[Any] = [{"role": "user", "content": "hello"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"kind": {"enum": ["whale", "squid"]}, "big": {"type": "boolean"}},
    "required": ["kind", "big"],
    "additionalProperties": False,
}


def form(schema: Any) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}


@needs_llguidance
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("temperature", [0, 2])
def test_an_answer_follows_its_schema(served: LiveServer, stream: bool, temperature: float) -> None:
    result: Any = served.client().chat.completions.create(
        model=MODEL,
        messages=CHAT,
        response_format=form(SCHEMA),
        temperature=temperature,
        n=3,
        seed=1,
        stream=stream,
    )
    texts = [""] * 3
    for part in list(result) if stream else [result]:
        for choice in part.choices:
            held = choice.delta if stream else choice.message
            texts[choice.index] += held.content or ""
    for text in texts:
        answer = json.loads(text)
        assert set(answer) == {"kind", "big"}
        assert answer["kind"] in ("whale", "squid")
        assert isinstance(answer["big"], bool)


@needs_llguidance
def test_an_object_begins_as_one_and_others_are_not_touched(served: LiveServer) -> None:
    client = served.client()
    settings: dict[str, Any] = {"model": MODEL, "messages": CHAT, "max_tokens": 8, "temperature": 0}
    bound = client.chat.completions.create(response_format={"type": "json_object"}, **settings)
    assert (bound.choices[0].message.content or "").startswith("{")
    assert client.chat.completions.create(**settings).choices[0].message.content == alone(CHAT, 8)


@pytest.mark.parametrize(
    "schema", [{"type": "nonsense"}, {"not": {}}, {"$ref": "http://a/b"}, {"type": 5}]
)
def test_what_cannot_be_followed_is_refused(served: LiveServer, schema: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.client().chat.completions.create(
            model=MODEL, messages=CHAT, response_format=form(schema)
        )
    assert caught.value.param == "response_format"
