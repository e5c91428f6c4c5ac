"""The bodies of answers: whole, and as server-sent events, in OpenAI's shape."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from pipeline.serve.failure import RequestFailure
from pipeline.serve.job import Ending

_DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Reply:
    """Builds everything that is sent about one answer.

    Attributes:
        model: name of the model.
        is_chat: whether it answers /v1/chat/completions or /v1/completions.
        prompt_tokens: length of the prompt.
        include_usage: whether a stream ends with the counts.
    """

    model: str
    is_chat: bool
    prompt_tokens: int
    include_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    name: str = field(default_factory=lambda: uuid.uuid4().hex)

    def whole(self, text: str, ending: Ending) -> dict[str, Any]:
        """The answer in one piece."""
        content: dict[str, Any] = {"text": text}
        if self.is_chat:
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        choice = self._choice(content, ending.reason)
        return self._envelope("chat.completion", [choice]) | {"usage": self.usage(ending)}

    def opening(self) -> bytes:
        """The first event of a stream: who speaks."""
        if not self.is_chat:
            return b""
        return self._event([self._choice({"delta": {"role": "assistant", "content": ""}}, None)])

    def piece(self, text: str) -> bytes:
        """The event of some more text."""
        content = {"delta": {"content": text}} if self.is_chat else {"text": text}
        return self._event([self._choice(content, None)])

    def closing(self, ending: Ending) -> bytes:
        """The last events: why it ended, the counts if they are wanted, and the end mark."""
        content: dict[str, Any] = {"delta": {}} if self.is_chat else {"text": ""}
        event = self._event([self._choice(content, ending.reason)])
        if self.include_usage:
            event += self._event([], self.usage(ending))
        return event + _DONE

    @staticmethod
    def broken_off(failure: RequestFailure) -> bytes:
        """The last events of a stream that cannot go on: OpenAI's client raises the error."""
        return _sse(failure.to_json()) + _DONE

    def usage(self, ending: Ending) -> dict[str, Any]:
        """Counts of tokens."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": ending.completion_tokens,
            "total_tokens": self.prompt_tokens + ending.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": ending.cached_tokens},
        }

    def _choice(self, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": reason}

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        return {
            "id": f"{prefix}-{self.name}",
            "object": kind if self.is_chat else "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        body = self._envelope("chat.completion.chunk", choices)
        return _sse(body | {"usage": usage} if self.include_usage else body)


def _sse(body: dict[str, Any]) -> bytes:
    """A server-sent event; JSON has no line breaks of its own."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode()
