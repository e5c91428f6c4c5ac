"""A model to talk to from Python: a session and its tokenizer.

from pipeline.runtime.language_model import LanguageModel

model = LanguageModel.open("cpu")  # whatever `skipcat run` takes
print(model.chat([{"role": "user", "content": "What is a whale?"}]).text)
for piece in model.stream("Once upon a time"):
    print(piece, end="", flush=True)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from pipeline.runtime.answer import Answer, answer
from pipeline.runtime.drafting import Lookup
from pipeline.runtime.generate import generate
from pipeline.runtime.prefix_cache import Transcript
from pipeline.runtime.sampling import GREEDY, Sampling
from pipeline.runtime.sessions.open_session import open_session
from pipeline.runtime.sessions.session import Session
from pipeline.runtime.text_stream import StopStrings
from pipeline.runtime.tokenizer import (
    Message,
    TextTokenizer,
    chat_prompt_ids,
    load_tokenizer,
    stop_token_ids,
)

Prompt = str | Sequence[int]


class LanguageModel:
    """Answers to prompts and conversations; what two prompts share is read once.

    Args:
        session: any backend; used by this object alone.
        tokenizer: of the same model.
        stop_ids: tokens that end an answer.
        lookup: whether guesses out of the conversation are read beside a token, where a call of
            several costs the session less than their calls would. What is chosen is the model's
            choice either way; only its rounding may differ, as that of any block of tokens does.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: TextTokenizer,
        stop_ids: frozenset[int] = frozenset(),
        lookup: bool = True,
    ) -> None:
        self.name, self.max_length = session.name, session.max_length
        self.tokenizer, self.stop_ids = tokenizer, stop_ids
        self._transcript = Transcript(session)
        self._row_cost = self._transcript.row_cost if lookup else None

    @classmethod
    def open(
        cls,
        folder: str | Path,
        backend: str = "auto",
        threads: int | None = None,
        device: str = "cpu",
        lookup: bool = True,
    ) -> LanguageModel:
        """Open an ONNX export, a checkpoint or an engine folder.

        Raises:
            InputError: the folder is of no kind that can be opened here, or does not load.
            UsageError: the folder is not of the kind that `backend` reads.
        """
        folder = Path(folder)
        tokenizer = load_tokenizer(folder)
        session = open_session(folder, backend, threads, device)
        return cls(session, tokenizer, stop_token_ids(tokenizer, folder), lookup)

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
        stops: Sequence[str] = (),
        seed: int | np.random.Generator = 0,
        emit: Callable[[str], None] = lambda text: None,
    ) -> Answer:
        """Answer a prompt, as it is or as ids; `emit` gets the text piece by piece.

        Raises:
            InputError: the prompt is empty, or longer than the cache.
        """
        return answer(
            self._transcript,
            self.tokenizer,
            self._ids(prompt),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_ids=self.stop_ids,
            stops=stops,
            generator=np.random.default_rng(seed),
            emit=emit,
            lookup=self._lookup(),
        )

    def chat(self, messages: list[Message], max_new_tokens: int = 256, **how: object) -> Answer:
        """Answer a conversation in the model's own chat format; `how` as in `generate`.

        Raises:
            InputError: there is no chat template, or it refuses the conversation.
        """
        ids = chat_prompt_ids(self.tokenizer, messages)
        return self.generate(ids, max_new_tokens, **how)  # type: ignore[arg-type]

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
        stops: Sequence[str] = (),
        seed: int = 0,
    ) -> Iterator[str]:
        """The same text as `generate`'s, piece by piece as it comes.

        Raises:
            InputError: the prompt is empty, or longer than the cache.
        """
        from pipeline.runtime.text_stream import Detokenizer

        detokenizer, watcher = Detokenizer(self.tokenizer), StopStrings(stops)
        generator = np.random.default_rng(seed)
        ids = generate(
            self._transcript,
            self._ids(prompt),
            max_new_tokens,
            sampling,
            self.stop_ids,
            generator,
            self._lookup(),
        )
        for token in ids:
            if text := watcher.push(detokenizer.push(token)):
                yield text
            if watcher.found is not None:
                return
        if text := watcher.push(detokenizer.finish()) + watcher.finish():
            yield text

    def _lookup(self) -> Lookup | None:
        return None if self._row_cost is None else Lookup(self._row_cost)

    def _ids(self, prompt: Prompt) -> Sequence[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
