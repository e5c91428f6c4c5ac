"""A model to talk to from Python: a session and its tokenizer.

from pipeline.runtime.language_model import LanguageModel

model = LanguageModel.open("cpu")  # whatever `skipcat run` takes
print(model.chat([{"role": "user", "content": "What is a whale?"}]).text)
for piece in model.stream("Once upon a time"):
    print(piece, end="", flush=True)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from pipeline.runtime.chat_template import require_text
from pipeline.runtime.drafting import PROMPT_LOOKUP, DraftSource, make_drafter
from pipeline.runtime.generate import Answer, answer, stream_text
from pipeline.runtime.open_answering import open_helped, require_device
from pipeline.runtime.prefix_cache import PrefixCache
from pipeline.runtime.sequence import Decoding
from pipeline.runtime.sessions.open_session import open_session
from pipeline.runtime.sessions.session import Session
from pipeline.runtime.tokenizer import (
    Message,
    TextTokenizer,
    chat_prompt_ids,
    load_tokenizer,
    start_template,
    stop_token_ids,
)

_Prompt = str | Sequence[int]
_USUAL = Decoding()


class LanguageModel:
    """Answers to prompts and conversations, one at a time; what two prompts share is read once.

    Args:
        session: any backend; used by this object alone.
        tokenizer: of the same model.
        stop_ids: tokens that end every answer, beside those of its `Decoding`.
        drafter: what proposes draft tokens, where a call of several costs the session less than
            their calls would; None for nothing. What is chosen is the model's choice either way;
            only its rounding may differ, as that of any block of tokens does, and not even that
            with a draft model's session.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: TextTokenizer,
        stop_ids: frozenset[int] = frozenset(),
        drafter: str | DraftSource | None = PROMPT_LOOKUP,
    ) -> None:
        self.name, self.max_length = session.name, session.max_length
        self.tokenizer, self.stop_ids = tokenizer, stop_ids
        self._cache = PrefixCache(session)
        self._drafter = drafter

    @classmethod
    def open(
        cls,
        folder: str | Path,
        backend: str = "auto",
        threads: int | None = None,
        device: str = "cpu",
        drafter: str | None = PROMPT_LOOKUP,
        draft: str | Path | None = None,
        memory: str | None = None,
        vram: str | None = None,
    ) -> LanguageModel:
        """Open an ONNX export, a checkpoint or an engine folder.

        Args:
            folder: of the model.
            backend: as for `open_session`.
            threads: of ONNX Runtime.
            device: of a checkpoint.
            drafter: as of a model; with `draft` it is asked first.
            draft: another export of the same model, in fewer bytes, that drafts for it: no bit of
                an answer depends on the drafts then.
            memory: bytes that weights, cache and draft of a checkpoint may take, such as "1GB";
                layers beyond it are read from disk for every call. No bit depends on drafts then.
            vram: with the device `cuda`, bytes that weights, cache and a call may take of it; the
                layers beyond that are copied there for every call. Likewise.

        Raises:
            InputError: the folder is of no kind that can be opened here, or does not load; or the
                draft does not fit it.
            UsageError: the folder is not of the kind that `backend` reads, or cannot have a draft.
        """
        folder = Path(folder)
        tokenizer = load_tokenizer(folder)
        start_template(tokenizer)
        stop_ids = stop_token_ids(tokenizer, folder)
        require_device(device, vram)
        if draft is None and memory is None and vram is None:
            session = open_session(folder, backend, threads, device)
            return cls(session, tokenizer, stop_ids, drafter)
        if device != "cpu" and vram is None:
            flag = "A draft model" if memory is None else "An offloaded model"
            raise UsageError(
                f"{flag} runs on the CPU, unless the GPU's memory is given by --vram.",
                observed=f"--device {device}",
                change="give --vram, such as 8GB, instead of --memory; or leave --device out",
            )
        small = None if draft is None else Path(draft)
        helped = open_helped(
            folder, small, backend, threads, lookup=drafter is not None, memory=memory, vram=vram
        )
        return cls(helped[0], tokenizer, stop_ids, drafter if draft is None else helped[1])

    @property
    def traffic(self) -> dict[str, Any]:
        """What an offloaded model has read or copied, and holds; nothing of one in memory."""
        found = getattr(self._cache.session, "traffic", None)
        return {} if found is None else asdict(found)

    def take_notice(self) -> str | None:
        """What there is to know of a draft model, once: that it does not pay, and by what times."""
        return self._drafter.take_notice() if isinstance(self._drafter, DraftSource) else None

    def generate(
        self,
        prompt: _Prompt,
        decoding: Decoding = _USUAL,
        emit: Callable[[str], None] = lambda text: None,
    ) -> Answer:
        """Answer a prompt, as it is or as ids; `emit` gets the text piece by piece.

        Raises:
            InputError: the prompt is empty, no text or ids, or longer than the cache.
            UsageError: a stream of this model is open. An answer of another thread is waited for.
        """
        ids, how = self._ids(prompt), self._own(decoding)
        drafter = make_drafter(self._cache.session, self._drafter)
        return answer(self._cache, self.tokenizer, ids, how, emit, drafter)

    def chat(
        self,
        messages: list[Message],
        decoding: Decoding = _USUAL,
        emit: Callable[[str], None] = lambda text: None,
        raw: bool = False,
    ) -> Answer:
        """Answer a conversation in the model's own chat format, or, raw, its last message alone.

        Raises:
            InputError: as `generate`; or there is no chat template, or it refuses the conversation.
        """
        return self.generate(chat_prompt_ids(self.tokenizer, messages, raw), decoding, emit)

    def stream(self, prompt: _Prompt, decoding: Decoding = _USUAL) -> Iterator[str]:
        """The same text as `generate`'s, piece by piece as it comes.

        Raises:
            InputError: the prompt is empty, or longer than the cache.
            UsageError: another stream of this model is open.
        """
        ids, how = self._ids(prompt), self._own(decoding)
        drafter = make_drafter(self._cache.session, self._drafter)
        yield from stream_text(self._cache, self.tokenizer, ids, how, drafter)

    def _own(self, decoding: Decoding) -> Decoding:
        """The settings with the model's own stop tokens."""
        return replace(decoding, stop_ids=self.stop_ids.union(decoding.stop_ids))

    def _ids(self, prompt: _Prompt) -> Sequence[int]:
        if not isinstance(prompt, str):
            return prompt
        require_text(prompt, "the prompt")
        return self.tokenizer.encode(prompt)
