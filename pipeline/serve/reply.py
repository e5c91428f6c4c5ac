"""The bodies of answers: whole, and as server-sent events, in OpenAI's shape."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from pipeline.serve.failure import RequestFailure
from pipeline.serve.job import Ending
from pipeline.serve.log_probs import ScoredText, TokenScore

_DONE = b"data: [DONE]\n\n"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Legal in JSON and in an event, but many readers of lines end one at each of them.
_LINE_BREAKS = {ord(letter): f"\\u{ord(letter):04x}" for letter in "\x85\u2028\u2029"}


@dataclass(frozen=True)
class Reply:
    """Builds everything that is sent about the answers to one request.

    Attributes:
        model: name of the model.
        is_chat: whether it answers /v1/chat/completions or /v1/completions.
        prompt_tokens: length of the prompt.
        include_usage: whether a stream ends with the counts.
        alternatives: log probabilities of so many of the likeliest tokens are shown with each
            token; None shows none at all.
    """

    model: str
    is_chat: bool
    prompt_tokens: int
    include_usage: bool = False
    alternatives: int | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    name: str = field(default_factory=lambda: uuid.uuid4().hex)

    def whole(self, answers: Sequence[tuple[ScoredText, Ending]]) -> dict[str, Any]:
        """The answers in one piece."""
        choices = []
        for index, (answer, ending) in enumerate(answers):
            content: dict[str, Any] = {"text": answer.text}
            if self.is_chat:
                message = {"role": "assistant", "content": answer.text, "refusal": None}
                content = {"message": message}
            scores = self._scores(answer.scores, 0)
            choices.append(self._choice(index, content, ending.reason, scores))
        usage = self.usage([ending for _, ending in answers])
        return self._envelope("chat.completion", choices) | {"usage": usage}

    def opening(self, index: int) -> bytes:
        """The first event of an answer that is streamed: who speaks."""
        if not self.is_chat:
            return b""
        content = {"delta": {"role": "assistant", "content": ""}}
        return self._event([self._choice(index, content, None)])

    def piece(self, index: int, piece: str | ScoredText, offset: int) -> bytes:
        """The event of some more text, of which `offset` characters came before."""
        text, scores = (piece, []) if isinstance(piece, str) else (piece.text, piece.scores)
        content = {"delta": {"content": text}} if self.is_chat else {"text": text}
        return self._event([self._choice(index, content, None, self._scores(scores, offset))])

    def closing(self, index: int, ending: Ending) -> bytes:
        """The last event of an answer: why it ended."""
        content: dict[str, Any] = {"delta": {}} if self.is_chat else {"text": ""}
        return self._event([self._choice(index, content, ending.reason)])

    def end(self, endings: Sequence[Ending]) -> bytes:
        """The last events of a stream: the counts if they are wanted, and the end mark."""
        return (self._event([], self.usage(endings)) if self.include_usage else b"") + _DONE

    @staticmethod
    def broken_off(failure: RequestFailure) -> bytes:
        """The last events of a stream that cannot go on: OpenAI's client raises the error."""
        return _sse(failure.to_json()) + _DONE

    def usage(self, endings: Sequence[Ending]) -> dict[str, Any]:
        """Counts of tokens; the prompt's once, however many answers there are."""
        answered = sum(ending.completion_tokens for ending in endings)
        cached = min(ending.cached_tokens for ending in endings)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": answered,
            "total_tokens": self.prompt_tokens + answered,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _scores(self, scores: Sequence[TokenScore], offset: int) -> dict[str, Any] | None:
        """Log probabilities as either interface has them; None where they are not wanted."""
        if self.alternatives is None:
            return None
        if self.is_chat:
            content = [_chat_score(score) for score in scores]
            return {"content": content, "refusal": None}
        ends = accumulate((len(score.text) for score in scores), initial=offset)
        return {
            "tokens": [score.text for score in scores],
            "token_logprobs": [score.log_prob for score in scores],
            "top_logprobs": [_by_text(s.likeliest) for s in scores] if self.alternatives else None,
            "text_offset": list(ends)[:-1],
        }

    def _choice(
        self,
        index: int,
        content: dict[str, Any],
        reason: str | None,
        scores: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        return {"index": index, **content, "logprobs": scores, "finish_reason": reason}

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


def _chat_score(score: TokenScore) -> dict[str, Any]:
    likeliest = [_token(text, log_prob) for text, log_prob in score.likeliest]
    return _token(score.text, score.log_prob) | {"top_logprobs": likeliest}


def _token(text: str, log_prob: float) -> dict[str, Any]:
    # A token can be part of a character; what its text shows then are not its bytes.
    known = _REPLACEMENT not in text
    return {"token": text, "logprob": log_prob, "bytes": list(text.encode()) if known else None}


def _by_text(likeliest: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Log probabilities by text; of tokens that read alike, the likeliest."""
    found: dict[str, float] = {}
    for text, log_prob in likeliest:
        found.setdefault(text, log_prob)
    return found


def _sse(body: dict[str, Any]) -> bytes:
    """A server-sent event, which every reader takes for one line."""
    return f"data: {json.dumps(body, ensure_ascii=False).translate(_LINE_BREAKS)}\n\n".encode()
