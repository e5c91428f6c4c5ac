"""One question, answered by every stage, so that a reader sees what the numbers mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import InputError
from pipeline.runtime.sessions.session import Session
from pipeline.runtime.tokenizer import TextTokenizer, chat_prompt_ids
from validate.greedy import trace_greedy

if TYPE_CHECKING:
    from pipeline.model.load import LoadedModel

_QUESTION = "What is a whale?"
_AS_DOCUMENT = "Question: What is a whale?\nAnswer:"
_ANSWER_TOKENS = 40


@dataclass(frozen=True)
class Question:
    """What every stage is asked.

    Attributes:
        text: as it was asked.
        ids: int64 [S].
        tokens: of the answer, at most.
        tokenizer: of the original.
        stop_ids: end the answer.
    """

    text: str
    ids: np.ndarray
    tokens: int
    tokenizer: TextTokenizer
    stop_ids: frozenset[int]

    @classmethod
    def of(
        cls, tokenizer: TextTokenizer, stop_ids: frozenset[int], longest: int, *, chat: bool
    ) -> Question | None:
        """The question in a model's tokens; None if it and an answer are longer than `longest`.

        Args:
            tokenizer: of the original.
            stop_ids: that end its answers.
            longest: tokens that a stage holds at once.
            chat: in the model's chat template; else as a document, which any model continues.

        Raises:
            InputError: the chat template refuses it.
        """
        text = _QUESTION if chat else _AS_DOCUMENT
        found = chat_prompt_ids(tokenizer, [{"role": "user", "content": text}], raw=not chat)
        tokens = min(_ANSWER_TOKENS, longest - len(found))
        if tokens <= 0:
            return None
        return cls(text, np.array(found, dtype=np.int64), tokens, tokenizer, stop_ids)

    def answer(self, session: Session) -> str:
        """What a session says greedily, on one line, up to where an answer ends."""
        tokens = trace_greedy(session, self.ids[None], self.tokens, {})[0].tokens
        end = next((n for n, token in enumerate(tokens) if token in self.stop_ids), len(tokens))
        said = self.tokenizer.decode(tokens[:end], skip_special_tokens=True)
        return " ".join(said.split())


def question_for(loaded: LoadedModel, longest: int, tell: Callable[[str], None]) -> Question | None:
    """The question in a model's own chat format, where it has one that works.

    Args:
        loaded: the original.
        longest: tokens that a stage holds at once.
        tell: is told where the format does not work.
    """
    asked = partial(Question.of, loaded.tokenizer, loaded.stop_ids, longest)
    try:
        return asked(chat=bool(loaded.tokenizer.chat_template))
    except InputError as error:
        tell(f"the question is asked as a document: {error}")
        return asked(chat=False)
