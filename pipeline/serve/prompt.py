"""Prompts to token ids, off the event loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pipeline.errors import InputError
from pipeline.runtime.tokenizer import Message, TextTokenizer, chat_prompt_ids
from pipeline.serve.failure import RequestFailure
from pipeline.serve.worker import Worker

# Pieces of a tokenizer that never leave out a character.
_KEEPING_NORMALIZERS = ("Lowercase", "NFD", "NFKD", "Prepend", "ByteLevel")
_COMPOSING_NORMALIZERS = ("NFC", "NFKC")
_KEEPING_SPLITTERS = ("ByteLevel", "Metaspace", "Digits", "Punctuation", "Split", "UnicodeScripts")
# Unicode's longest canonical decomposition: so many characters become one.
_COMPOSED = 4


class _TokenBound:
    """A lower bound of the tokens of a text.

    It is the length over that of the longest token, for tokenizers in which every character comes
    into some token; for others it is 0.

    Args:
        backend: a `tokenizers.Tokenizer`; anything else has no bound.
    """

    def __init__(self, backend: Any) -> None:
        self._characters = _most_characters(backend) if hasattr(backend, "get_vocab") else None
        added = backend.get_added_tokens_decoder().values() if self._characters else ()
        # Such tokens take in all the blanks beside them.
        self._drops_blanks = any(token.lstrip or token.rstrip for token in added)

    def fewest_tokens(self, text: str) -> int:
        """So many tokens, at the least, are the ids of a text."""
        if self._characters is None:
            return 0
        length = sum(map(len, text.split())) if self._drops_blanks else len(text)
        return -(-length // self._characters)


def _most_characters(backend: Any) -> int | None:
    """Most characters of a text that one token stands for; None where there is no such number."""
    parts = [*_parts(backend.normalizer), *_parts(backend.pre_tokenizer)]
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if not _keeps_everything(backend.model, parts, vocabulary):
        return None
    composed = _COMPOSED if any(p["type"] in _COMPOSING_NORMALIZERS for p in parts) else 1
    return composed * max(map(len, vocabulary), default=1)


def _keeps_everything(model: Any, parts: list[dict[str, Any]], vocabulary: dict[str, int]) -> bool:
    """Whether every character of a text is part of one of its tokens."""
    if type(model).__name__ != "BPE" or not all(map(_keeps, parts)):
        return False
    if any(part["type"] == "ByteLevel" for part in parts):
        from tokenizers.pre_tokenizers import ByteLevel

        return all(letter in vocabulary for letter in ByteLevel.alphabet())
    if model.byte_fallback:
        return all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    return model.unk_token is not None and not model.fuse_unk


def _keeps(part: dict[str, Any]) -> bool:
    """Whether one normalizer or splitter leaves out nothing."""
    kind = part["type"]
    if kind == "Replace":
        old = part["pattern"].get("String")
        return old is not None and len(part["content"]) >= len(old)
    if kind in ("Split", "Punctuation"):
        return part["behavior"] != "Removed"
    known = _KEEPING_NORMALIZERS + _COMPOSING_NORMALIZERS + _KEEPING_SPLITTERS
    return kind in known


def _parts(component: Any) -> list[dict[str, Any]]:
    """The settings of a normalizer or splitter, one by one where it is a sequence."""
    if component is None:
        return []
    return _flat(json.loads(component.__getstate__()))


def _flat(settings: dict[str, Any]) -> list[dict[str, Any]]:
    if settings["type"] != "Sequence":
        return [settings]
    held = settings.get("normalizers", settings.get("pretokenizers", []))
    return [part for one in held for part in _flat(one)]


# Texts up to this length are read in milliseconds, and have a thread of their own: they never wait
# for long ones, which take up to seconds.
_SHORT_CHARACTERS = 8192
_LONGEST_REASON = 500


class PromptReader:
    """Turns prompts into ids, the short ones in one thread and the long ones in another.

    A tokenizer is made for one thread at a time, its methods let other threads run.

    Args:
        tokenizer: for short prompts.
        second: for long ones; the same, if it may be used by two threads at once.
        vocab_size: ids at or above it are refused.
        max_length: longest prompt, in tokens.
    """

    def __init__(
        self, tokenizer: TextTokenizer, second: TextTokenizer, vocab_size: int, max_length: int
    ) -> None:
        self._vocab_size, self._max_length = vocab_size, max_length
        self._bound = _TokenBound(getattr(tokenizer, "backend_tokenizer", None))
        self._has_template = bool(tokenizer.chat_template)
        self._short = (tokenizer, Worker("tokenizer"))
        self._long = (second, Worker("tokenizer of long prompts"))

    async def chat_ids(self, messages: list[Message]) -> list[int]:
        """Ids of a conversation, up to where the answer begins.

        Raises:
            RequestFailure: the model has no chat template, its template refuses the messages or
                fails, or they are too long.
        """
        if not self._has_template:
            raise RequestFailure(
                400,
                "This model has no chat template; use /v1/completions.",
                param="messages",
                code="no_chat_template",
            )
        length = sum(len(message["content"]) for message in messages)
        return await self._run(length, lambda tokenizer: self._chat(tokenizer, messages))

    async def ids(self, prompt: str | list[int]) -> list[int]:
        """Ids of a text as it is, or those that the client made itself.

        Raises:
            RequestFailure: it is empty or too long, or the tokenizer fails, or an id lies outside
                the vocabulary.
        """
        if isinstance(prompt, str):
            return await self._text_ids(prompt)
        return self._given_ids(prompt)

    def close(self) -> None:
        """Let the threads end, and wait for none of them."""
        self._short[1].close()
        self._long[1].close()

    async def _text_ids(self, text: str) -> list[int]:
        self._require_short(text, "prompt")  # before it waits for its turn
        return await self._run(len(text), lambda tokenizer: self._ids(tokenizer, text, "prompt"))

    def _given_ids(self, ids: list[int]) -> list[int]:
        self._require_fitting(ids, "prompt")
        wrong = next((token for token in ids if not 0 <= token < self._vocab_size), None)
        if wrong is not None:
            raise RequestFailure(
                400,
                f"The token id {str(wrong)[:50]} lies outside the vocabulary of "
                f"{self._vocab_size}.",
                param="prompt",
                code="invalid_token",
            )
        return ids

    async def _run(self, length: int, work: Callable[[TextTokenizer], list[int]]) -> list[int]:
        tokenizer, worker = self._short if length <= _SHORT_CHARACTERS else self._long
        return await worker.run(lambda: work(tokenizer))

    def _chat(self, tokenizer: TextTokenizer, messages: list[Message]) -> list[int]:
        try:
            return chat_prompt_ids(_Checked(tokenizer, self._ids), messages)  # type: ignore[arg-type]
        except RequestFailure:
            raise
        except BaseException as error:  # a template is a program of others, and fails as it likes
            raise RequestFailure(
                400,
                f"The model's chat template refuses these messages: {_reason(error)}",
                param="messages",
                code="template_refused",
            ) from error

    def _ids(
        self, tokenizer: TextTokenizer, text: str, param: str, add_special_tokens: bool = True
    ) -> list[int]:
        self._require_short(text, param)
        try:
            ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except BaseException as error:  # the library's panics are no Exceptions
            raise RequestFailure(
                400,
                f"The model's tokenizer cannot read this text: {_reason(error)}",
                param=param,
                code="tokenizer_refused",
            ) from error
        return self._require_fitting(ids, param)

    def _require_short(self, text: str, param: str) -> None:
        """Raise RequestFailure for a text that is too long whatever its tokens are."""
        fewest = self._bound.fewest_tokens(text)
        if fewest > self._max_length:
            raise self._too_long(f"at least {fewest}", param)

    def _require_fitting(self, ids: list[int], param: str) -> list[int]:
        if not ids:
            raise RequestFailure(400, "The prompt is empty.", param=param, code="empty_prompt")
        if len(ids) > self._max_length:
            raise self._too_long(str(len(ids)), param)
        return ids

    def _too_long(self, count: str, param: str) -> RequestFailure:
        return RequestFailure(
            400,
            f"The prompt has {count} tokens; this model's context holds {self._max_length}.",
            param=param,
            code="context_length_exceeded",
        )


class _Checked:
    """A tokenizer whose failures are told from those of its chat template."""

    def __init__(self, tokenizer: TextTokenizer, ids: Callable[..., list[int]]) -> None:
        self._tokenizer, self._ids = tokenizer, ids

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self._ids(self._tokenizer, text, "messages", add_special_tokens)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def _reason(error: BaseException) -> str:
    """Why foreign code failed, in a line or so: it may have put a whole prompt there."""
    observed = error.details.get("observed", "") if isinstance(error, InputError) else str(error)
    reason = observed or type(error).__name__
    return reason if len(reason) <= _LONGEST_REASON else reason[:_LONGEST_REASON] + " ..."
