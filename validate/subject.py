"""A model that is evaluated: opened here, or by whoever measures its windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import UsageError
from pipeline.export.contract import RECORD_FILE
from pipeline.runtime.sessions.open_session import open_session
from pipeline.runtime.sessions.session import Session
from pipeline.runtime.tokenizer import load_whole_tokenizer, stop_token_ids
from pipeline.workers.workers import IN_PROCESS, InOrder, Workers
from validate.quality import Quality, Windows, measure_quality, window_quality

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ModelPlace:
    """Where a model is, and how it is opened.

    Attributes:
        name: folder, absolute, of an ONNX export or a checkpoint; or an alias, hub id or GGUF file.
        backend: `auto`, `torch` or `onnx`.
        threads: of ONNX Runtime within one operator.
        trust_remote_code: let the model's own Python code run.
    """

    name: str
    backend: str = "auto"
    threads: int | None = None
    trust_remote_code: bool = False

    @classmethod
    def of(cls, name: str, **how: Any) -> ModelPlace:
        """As the user names it; a path is made absolute, for processes that begin elsewhere."""
        path = Path(name).expanduser()
        return cls(str(path.resolve()) if path.exists() else name, **how)

    @property
    def folder(self) -> Path | None:
        """Where it is read from as it is; None for what `pipeline.model.load` reads."""
        folder = Path(self.name).expanduser()
        # skipcat's own checkpoints need no code but skipcat's, and `load_model` takes none of them.
        needs_code = self.trust_remote_code and not (folder / "recipe.json").is_file()
        is_checkpoint = (folder / "config.json").is_file() and not needs_code
        return folder if is_checkpoint or (folder / RECORD_FILE).is_file() else None


@dataclass(frozen=True)
class _Facts:
    """What is to be known of a session beforehand.

    Attributes:
        name: of the session.
        max_length: tokens that it holds.
        vocab_size: words that it knows.
    """

    name: str
    max_length: int
    vocab_size: int

    @classmethod
    def of(cls, session: Session) -> _Facts:
        return cls(session.name, session.max_length, session.vocab_size)


class Subject:
    """What is tested, or what that should be like.

    Args:
        place: where it is.
        open_session: opens it in this process, when it is first needed here.
        tokenizer: of the model.
        stop_ids: that end an answer.
        workers: who measures windows of text.
    """

    def __init__(
        self,
        place: ModelPlace,
        open_session: Callable[[], Session],
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: frozenset[int],
        workers: Workers = IN_PROCESS,
    ) -> None:
        self.place, self.tokenizer, self.stop_ids = place, tokenizer, stop_ids
        self._open, self._workers = open_session, workers

    @classmethod
    def open(cls, place: ModelPlace, workers: Workers = IN_PROCESS) -> Subject:
        """Open an ONNX export, a checkpoint folder, or a model by alias, hub id or GGUF file.

        Raises:
            InputError: nothing of that name, or it does not load.
            UsageError: the backend cannot read it.
        """
        folder = place.folder
        if folder is None:
            if place.backend == "onnx":
                raise UsageError(
                    "The backend 'onnx' reads exported folders only.",
                    where=place.name,
                    change="export the model first, or pass --backend torch",
                )
            return cls._named(place, workers)
        tokenizer = load_whole_tokenizer(folder)
        stop_ids = stop_token_ids(tokenizer, folder)

        def opened() -> Session:
            return open_session(folder, place.backend, place.threads)

        subject = cls(place, opened, tokenizer, stop_ids, workers)
        _ = subject.facts
        return subject

    @classmethod
    def _named(cls, place: ModelPlace, workers: Workers) -> Subject:
        """Anything that `pipeline.model.load` takes, in float32."""
        from pipeline.model.load import load_model
        from pipeline.runtime.sessions.torch_session import TorchSession

        loaded = load_model(place.name, trust_remote_code=place.trust_remote_code)
        session = TorchSession(loaded.model, "torch float32")
        return cls(place, lambda: session, loaded.tokenizer, loaded.stop_ids, workers)

    @cached_property
    def session(self) -> Session:
        """The model, opened in this process."""
        return self._open()

    @cached_property
    def facts(self) -> _Facts:
        """Told by a worker, where workers measure: this process need not open the model then."""
        if self._workers is IN_PROCESS or self.place.folder is None:
            return _Facts.of(self.session)
        return self._workers.submit(f"opening {self.place.name}", _facts_of, self.place).get()

    def quality(
        self, reference: Subject | None, windows: np.ndarray, tell: Callable[[str], None]
    ) -> Quality:
        """Measured on windows of text, int64 [W, L] (see `measure_quality`)."""
        if self._workers is IN_PROCESS:
            other = None if reference is None else reference.session
            return measure_quality(self.session, other, windows, tell)
        measured = Windows(len(windows), tell)
        places = self.place, None if reference is None else reference.place

        def take(_: int, columns: list[np.ndarray]) -> None:
            measured.add(columns[0])

        waiting = InOrder(self._workers, take)
        for number, window in enumerate(windows):
            where = f"window {number + 1} of the text"
            waiting.add(number, [self._workers.submit(where, _window_of, *places, window)])
        waiting.finish()
        return measured.quality()


# A worker keeps what it has opened: a model and its reference.
@lru_cache(maxsize=2)
def _opened(place: ModelPlace) -> Session:
    return Subject.open(place).session


def _facts_of(place: ModelPlace) -> _Facts:
    return _Facts.of(_opened(place))


def _window_of(place: ModelPlace, reference: ModelPlace | None, window: np.ndarray) -> np.ndarray:
    """What `window_quality` finds, of models that this process opens."""
    other = None if reference is None else _opened(reference)
    return window_quality(_opened(place), other, window)
