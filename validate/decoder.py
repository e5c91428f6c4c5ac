"""The ledger of a decoder language model: logits, perplexity and greedy answers, by token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pipeline.errors import UsageError
from pipeline.export.record import read_export_record, require_weights
from pipeline.model.task import TEXT, Task
from pipeline.runtime.sessions.session import Session
from validate.artefacts import Artefacts
from validate.compare import StageLogits
from validate.greedy import GreedyAgreement, GreedyTrace, trace_greedy
from validate.ledger import Adapter, Column, Drawn, Loaded
from validate.metrics import log_perplexity_change
from validate.quality import Perplexity, measure_perplexity
from validate.question import Question, question_for
from validate.record import PerplexityChange, Row
from validate.stages import Openers, Tolerance, export_record_if_readable

_BATCHES = 4
_BATCH_TOKENS = 128
_PROMPT_TOKENS = 32
# Behind a cache that holds the rest of a window: one token in each of so many calls, then several
# at once in each of two. A graph can be right for a prompt and wrong for these.
_CACHED_WINDOWS, _SINGLE_STEPS, _BLOCK, _BLOCKS = 2, 4, 8, 2
_CACHED_TOKENS = _SINGLE_STEPS + _BLOCK * _BLOCKS
# Text that the model writes for its evaluation must not be the text it was calibrated on.
_EVALUATION_SEED_OFFSET = 1_000_003


@dataclass(frozen=True)
class _TextOptions:
    """On which text, and on how much of it.

    Attributes:
        text: a UTF-8 file, or `self` for text that the original generates.
        windows: windows of the perplexity.
        window_length: tokens in each.
        prompts: prompts for greedy decoding.
        max_new_tokens: tokens decoded per prompt.
    """

    text: str = "self"
    windows: int = 10
    window_length: int = 512
    prompts: int = 8
    max_new_tokens: int = 64
    task: ClassVar[Task] = TEXT

    @property
    def longest_input(self) -> int:
        """Most tokens that a stage will hold at once: a window, or a prompt with its answer."""
        return max(self.window_length, _PROMPT_TOKENS + self.max_new_tokens)

    def check(self, artefacts: Artefacts) -> None:
        """Refuse lengths that leave too little to measure or do not fit a cache.

        Raises:
            UsageError: names the option.
        """
        if self.window_length < _PROMPT_TOKENS:
            raise UsageError(
                "The windows are too short.",
                observed=f"--window-length {self.window_length}",
                expected=f"at least {_PROMPT_TOKENS}",
            )
        available = self.windows * (self.window_length // _PROMPT_TOKENS)
        if self.prompts > available:
            raise UsageError(
                "There is too little text for so many prompts.",
                observed=f"--prompts {self.prompts}",
                expected=f"at most {available}",
                change="ask for more or longer windows",
            )
        _require_room_for(artefacts, self.longest_input)


@dataclass(frozen=True)
class _Inputs:
    """What every stage is given.

    Attributes:
        token_batches: int64 [B, S] each; their logits are compared token by token.
        windows: int64 [W, L]; for the perplexity.
        prompts: int64 [P, S]; for greedy decoding.
        max_new_tokens: tokens decoded per prompt.
        question: None where it is longer than all else.
    """

    token_batches: list[np.ndarray]
    windows: np.ndarray
    prompts: np.ndarray
    max_new_tokens: int
    question: Question | None

    @property
    def cached_batches(self) -> list[np.ndarray]:
        """Whole windows, int64 [1, L] each, whose last tokens are read behind a cache."""
        return [window[None] for window in self.windows[:_CACHED_WINDOWS]]

    def describe(self) -> dict[str, Any]:
        """Counts and lengths, for the ledger."""
        length = self.windows.shape[1]
        return {
            "token_batches": [list(batch.shape) for batch in self.token_batches],
            "cached": {
                "batches": len(self.cached_batches),
                "prompt": _cuts(length)[0],
                "tokens": length - _cuts(length)[0],
            },
            "windows": list(self.windows.shape),
            "prompts": list(self.prompts.shape),
            "max_new_tokens": self.max_new_tokens,
            "question": None if self.question is None else self.question.text,
        }


@dataclass(frozen=True)
class _Outputs:
    """What a stage answered."""

    logits: StageLogits
    cached: StageLogits
    perplexity: Perplexity
    traces: list[GreedyTrace]
    answer: str | None

    def complaints(self, tolerance: Tolerance, reference: _Outputs | None) -> list[str]:
        """A perplexity that is NaN or infinite; an answer that leaves the reference's for no tie.

        Both took the same tokens up to there, so only rounding may part them.
        """
        value = self.perplexity.value
        complaints = [] if value < float("inf") else [f"its perplexity is {value}"]
        if reference is None or tolerance.max_greedy_gap is None:
            return complaints
        agreement = GreedyAgreement.of(reference.logits.name, self.traces, reference.traces)
        return complaints + agreement.complaints(tolerance.max_greedy_gap)

    def row_fields(self, reference: _Outputs | None, original: _Outputs | None) -> dict[str, Any]:
        """Perplexity, its change, the agreement of greedy answers, and one to read."""
        to_reference, to_original = (
            None
            if other is None
            else GreedyAgreement.of(other.logits.name, self.traces, other.traces)
            for other in (reference, original)
        )
        return {
            "greedy_to_reference": to_reference,
            "greedy_to_original": to_original,
            "perplexity": self.perplexity,
            "perplexity_change": None if original is None else self._change(original),
            "answer": self.answer,
        }

    def _change(self, original: _Outputs) -> PerplexityChange:
        """Perplexity against the original's."""
        before, after = original.perplexity.window_nlls, self.perplexity.window_nlls
        return PerplexityChange(*log_perplexity_change(np.array(before), np.array(after)))


def _options(
    original: str,
    *,
    images: str | None = None,
    image_count: int | None = None,
    data: str | None = None,
    **text: Any,
) -> _TextOptions:
    """The options among the flags; raise UsageError for those of images."""
    if images is not None or image_count is not None or data is not None:
        raise UsageError(
            "A language model takes no images.",
            where="--images" if data is None else "--data",
            observed=original,
            change="give --text",
        )
    return _TextOptions(**text)


def _load(
    original: str,
    options: _TextOptions,
    seed: int,
    trust_remote_code: bool,
    tell: Callable[[str], None],
) -> Loaded:
    """The model in float32; the first windows of a file, or of its own text under a seed apart."""
    import torch

    from pipeline.calibrate.text import load_tokens
    from pipeline.model.load import load_model

    loaded = load_model(original, dtype=torch.float32, trust_remote_code=trust_remote_code)
    source = "generating" if options.text == "self" else "reading"
    tell(f"{source} {options.windows} windows of {options.window_length} tokens")
    batch = load_tokens(
        options.text,
        loaded.tokenizer,
        loaded.model,
        count=options.windows,
        length=options.window_length,
        seed=seed + _EVALUATION_SEED_OFFSET,
        sequential=True,
    )
    windows = batch.tokens.numpy()
    inputs = _Inputs(
        # The beginnings of the first windows; logits of more would fill memory.
        [window[None, :_BATCH_TOKENS] for window in windows[:_BATCHES]],
        windows,
        _prompts_of(windows, options.prompts),
        options.max_new_tokens,
        question_for(loaded, options.longest_input, tell),
    )
    described: dict[str, Any] = {"text": batch.describe()}
    if remark := _remark_on_window(loaded.model.config, windows.shape[1]):
        tell(remark)
        described["sliding_window"] = remark
    return Loaded(loaded.model, inputs, described)


def _prompts_of(windows: np.ndarray, count: int) -> np.ndarray:
    """Prompts out of the windows, int64 [count, _PROMPT_TOKENS].

    They are the first pieces of all windows, then the second pieces, and so on.
    """
    pieces = windows.shape[1] // _PROMPT_TOKENS
    cut = windows[:, : pieces * _PROMPT_TOKENS].reshape(len(windows), pieces, _PROMPT_TOKENS)
    return cut.transpose(1, 0, 2).reshape(-1, _PROMPT_TOKENS)[:count]


def _measure(
    name: str, session: Session, inputs: _Inputs, watched: Mapping[str, _Outputs]
) -> _Outputs:
    """Logits, perplexity and greedy answers of a session."""
    traces = {other: outputs.traces for other, outputs in watched.items()}
    return _Outputs(
        StageLogits.of(name, session.forward, inputs.token_batches, before=session.reset),
        StageLogits.of(name, partial(_behind_cache, session), inputs.cached_batches, session.reset),
        measure_perplexity(session, inputs.windows),
        trace_greedy(session, inputs.prompts, inputs.max_new_tokens, traces),
        None if inputs.question is None else inputs.question.answer(session),
    )


def _cuts(length: int) -> list[int]:
    """Where the calls end that read a window of so many tokens, the prompt's first."""
    prompt = max(1, length - _CACHED_TOKENS)
    singles = range(prompt, min(prompt + _SINGLE_STEPS, length) + 1)
    return [*dict.fromkeys([*singles, min(singles[-1] + _BLOCK, length), length])]


def _behind_cache(session: Session, ids: np.ndarray) -> np.ndarray:
    """Logits of the last tokens of a window, float32 [1, S, V], read behind all before them.

    Args:
        session: empty.
        ids: int64 [1, L], two tokens at least.
    """
    cuts = _cuts(ids.shape[1])
    session.forward(ids[:, : cuts[0]], last_only=True)
    parts = [session.forward(ids[:, start:end]) for start, end in pairwise(cuts)]
    return np.concatenate(parts, axis=1)


def _remark_on_window(config: Any, length: int) -> str:
    """What there is to say of a sliding window that texts of so many tokens do not pass."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"]
    slides = any("sliding" in str(kind) for kind in kinds)
    if not slides or not isinstance(window, int) or window <= 0 or _cuts(length)[0] > window:
        return ""
    return (
        f"the model's window of {window} tokens is not passed by texts of {length}; "
        f"--window-length {window + _CACHED_TOKENS + 1} does"
    )


def _require_room_for(artefacts: Artefacts, tokens: int) -> None:
    """Raise UsageError when an export's cache is shorter than the longest input.

    It is checked before anything runs, since the stages before the short one take minutes.
    """
    for folder in artefacts.onnx:
        record = export_record_if_readable(folder)
        if record is not None and record.max_length < tokens:
            raise UsageError(
                "The inputs are longer than an export's cache.",
                where=folder,
                observed=f"{tokens} tokens",
                expected=f"at most {record.max_length}",
                change="pass a smaller --window-length or --max-new-tokens",
            )


def _open_model(model: Any, name: str) -> Session:
    from pipeline.runtime.sessions.torch_session import TorchSession

    return TorchSession(model, name)


def _open_full_cache(model: Any, name: str) -> Session:
    from pipeline.runtime.sessions.torch_session import TorchSession

    return TorchSession(model, name, latent=False)


def _open_in_pieces(model: Any, name: str) -> Session:
    from validate.in_pieces import SessionInPieces

    return SessionInPieces(model, name)


def _open_rounded_cache(model: Any, folder: Path, name: str) -> Session:
    from pipeline.export.rounded_cache import empty_cache, read_rounding
    from pipeline.runtime.sessions.torch_session import TorchSession

    rounding = read_rounding(folder)
    return TorchSession(model, name, cache=lambda: empty_cache(model.config, rounding))


def _open_onnx(folder: Path, name: str) -> Session:
    record = read_export_record(folder)
    require_weights(folder, record, known=False)
    if record.profile == "cpu":
        from pipeline.runtime.sessions.onnx_cpu_session import CpuSession

        return CpuSession(folder, name=name)
    from pipeline.runtime.sessions.onnx_session import OnnxSession

    return OnnxSession(folder, name=name)


def _open_engine(folder: Path, name: str) -> Session:
    from pipeline.runtime.sessions.open_session import open_engine_session

    return open_engine_session(folder, name)


def _greedy_cell(row: Row) -> str | None:
    both = (row.greedy_to_reference, row.greedy_to_original)
    if all(one is None for one in both):
        return None
    return " / ".join("-" if one is None else f"{one.identical_fraction:.0%}" for one in both)


def _perplexity_cell(row: Row) -> str | None:
    if row.perplexity is None:
        return None
    if row.perplexity.standard_error is None:
        return f"{row.perplexity.value:.5g}"
    return f"{row.perplexity.value:.5g} ± {row.perplexity.standard_error:#.2g}"


def _perplexity(row: Row) -> tuple[float, float | None] | None:
    found = row.perplexity
    return None if found is None else (found.value, found.standard_error)


DECODER = Adapter(
    options=_options,
    load=_load,
    openers=Openers(
        _open_model,
        _open_onnx,
        _open_engine,
        _open_full_cache,
        _open_in_pieces,
        _open_rounded_cache,
    ),
    measure=_measure,
    item="token",
    per_item="per token",
    top1="Tokens whose likeliest successor is the original's.",
    columns=(
        Column(
            "greedy",
            "Tokens decoded alike: with what it should equal / the original.",
            _greedy_cell,
        ),
        Column(
            "perplexity",
            "With its standard error, windows as independent units.",
            _perplexity_cell,
        ),
    ),
    drawn=Drawn("Perplexity, with one standard error", _perplexity),
)
