"""Prompts to token ids, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pipeline.errors import InputError
from pipeline.runtime.tokenizer import Message, TextTokenizer, chat_prompt_ids
from pipeline.serve.failure import RequestFailure

_Result = TypeVar("_Result")


class PromptReader:
    """Turns prompts into ids in one thread of its own: a tokenizer is not made for several.

    Args:
        tokenizer: used by this thread alone.
        vocab_size: ids at or above it are refused.
        max_length: longest prompt, in tokens.
    """

    def __init__(self, tokenizer: TextTokenizer, vocab_size: int, max_length: int) -> None:
        self._tokenizer, self._vocab_size, self._max_length = tokenizer, vocab_size, max_length
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    async def chat_ids(self, messages: list[Message]) -> list[int]:
        """Ids of a conversation, up to where the answer begins.

        Raises:
            RequestFailure: the model has no chat template, its template refuses the messages, or
                they are too long.
        """
        if not self._tokenizer.chat_template:
            raise RequestFailure(
                400,
                "This model has no chat template; use /v1/completions.",
                param="messages",
                code="no_chat_template",
            )
        ids = await self._run(lambda: self._apply_template(messages))
        return self._checked(ids, "messages")

    async def text_ids(self, text: str) -> list[int]:
        """Ids of a text as it is.

        Raises:
            RequestFailure: it is empty or too long.
        """
        ids = await self._run(lambda: self._tokenizer.encode(text))
        return self._checked(ids, "prompt")

    def given_ids(self, ids: list[int]) -> list[int]:
        """Ids that the client made itself.

        Raises:
            RequestFailure: there are none or too many, or one lies outside the vocabulary.
        """
        wrong = next((token for token in ids if not 0 <= token < self._vocab_size), None)
        if wrong is not None:
            raise RequestFailure(
                400,
                f"The token id {wrong} lies outside the vocabulary of {self._vocab_size}.",
                param="prompt",
                code="invalid_token",
            )
        return self._checked(ids, "prompt")

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    async def _run(self, work: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _apply_template(self, messages: list[Message]) -> list[int]:
        from jinja2 import TemplateError

        try:
            return chat_prompt_ids(self._tokenizer, messages)
        except (InputError, TemplateError) as error:
            reason = error.details.get("observed", "") if isinstance(error, InputError) else error
            raise RequestFailure(
                400,
                f"The model's chat template refuses these messages: {reason}",
                param="messages",
                code="template_refused",
            ) from error

    def _checked(self, ids: list[int], param: str) -> list[int]:
        if not ids:
            raise RequestFailure(400, "The prompt is empty.", param=param, code="empty_prompt")
        if len(ids) > self._max_length:
            raise RequestFailure(
                400,
                f"The prompt has {len(ids)} tokens; this model's context holds {self._max_length}.",
                param=param,
                code="context_length_exceeded",
            )
        return ids
