"""The verb: artefacts and a text in, a ledger and its reports out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.artefact import staged_folder, write_json, write_text
from pipeline.errors import UsageError, ValidationError
from validate.ledger import run_ledger
from validate.record import Ledger
from validate.rounding import read_rounding
from validate.stages import ORIGINAL, Artefacts, require_room_for, standard_stages

if TYPE_CHECKING:
    from pipeline.calibrate.text import TokenBatch
    from pipeline.model.load import LoadedModel
    from pipeline.runtime.sessions.session import Session

BATCHES = 4
BATCH_TOKENS = 128
PROMPT_TOKENS = 32
# Text that the model writes for its evaluation must not be the text it was calibrated on.
EVALUATION_SEED_OFFSET = 1_000_003


@dataclass(frozen=True)
class ValidateRequest:
    """What to validate, and on how much.

    Attributes:
        artefacts: the stages' files.
        text: a UTF-8 file, or `self` for text that the original generates.
        windows: windows of the perplexity.
        window_length: tokens in each.
        prompts: prompts for greedy decoding.
        max_new_tokens: tokens decoded per prompt.
        max_kl: most KL to the original; None sets no limit.
        strict: let an engine that cannot run here count as a failure.
        seed: decides the generated text.
        trust_remote_code: let the original's own Python code run.
    """

    artefacts: Artefacts
    text: str = "self"
    windows: int = 10
    window_length: int = 512
    prompts: int = 8
    max_new_tokens: int = 64
    max_kl: float | None = None
    strict: bool = False
    seed: int = 0
    trust_remote_code: bool = False


class Original:
    """The original model, loaded once for the text and for its own stage, then let go."""

    def __init__(self, request: ValidateRequest) -> None:
        self._request = request
        self._loaded: LoadedModel | None = None

    def load(self) -> LoadedModel:
        """The model in float32.

        Raises:
            InputError: it does not load.
        """
        import torch

        from pipeline.model.load import load_model

        if self._loaded is None:
            self._loaded = load_model(
                self._request.artefacts.original,
                dtype=torch.float32,
                trust_remote_code=self._request.trust_remote_code,
            )
        return self._loaded

    def open_session(self) -> Session:
        """The stage's session; from here on only the session holds the model."""
        from pipeline.runtime.sessions.torch_session import TorchSession

        loaded = self.load()
        self._loaded = None
        return TorchSession(loaded.model, ORIGINAL)


def validate(
    request: ValidateRequest, progress: Callable[[str], None] = lambda message: None
) -> Ledger:
    """Run the ledger.

    Raises:
        InputError: the original or the text does not load.
        UsageError: too few tokens asked for, or more than an export's cache holds.
    """
    require_lengths(request)
    progress(f"loading {request.artefacts.original}")
    original = Original(request)
    stages = standard_stages(request.artefacts, original.open_session, request.max_kl)
    batch = evaluation_tokens(request, original, progress)
    windows = batch.tokens.numpy()
    ledger = run_ledger(
        stages,
        token_batches_of(windows),
        windows,
        prompts_of(windows, request.prompts),
        max_new_tokens=request.max_new_tokens,
        strict=request.strict,
        description=describe(request, batch),
        progress=progress,
    )
    checkpoint = request.artefacts.checkpoint
    return replace(ledger, rounding=None if checkpoint is None else read_rounding(checkpoint))


def require_lengths(request: ValidateRequest) -> None:
    """Raise UsageError for lengths that leave too little to measure or do not fit a cache."""
    if request.window_length < PROMPT_TOKENS:
        raise UsageError(
            "The windows are too short.",
            observed=f"--window-length {request.window_length}",
            expected=f"at least {PROMPT_TOKENS}",
        )
    require_prompts(request.prompts, request.windows * (request.window_length // PROMPT_TOKENS))
    require_room_for(request.artefacts, longest_input(request))


def require_prompts(wanted: int, available: int) -> None:
    """Raise UsageError when the windows cannot be cut into so many prompts."""
    if wanted > available:
        raise UsageError(
            "There is too little text for so many prompts.",
            observed=f"--prompts {wanted}",
            expected=f"at most {available}",
            change="ask for more or longer windows",
        )


def longest_input(request: ValidateRequest) -> int:
    """Most tokens that a stage will hold at once: a window, or a prompt with its answer."""
    return max(request.window_length, PROMPT_TOKENS + request.max_new_tokens)


def evaluation_tokens(
    request: ValidateRequest, original: Original, progress: Callable[[str], None]
) -> TokenBatch:
    """The windows: the first of a file, or text of the original under a seed of its own."""
    from pipeline.calibrate.text import load_tokens

    loaded = original.load()
    source = "generating" if request.text == "self" else "reading"
    progress(f"{source} {request.windows} windows of {request.window_length} tokens")
    return load_tokens(
        request.text,
        loaded.tokenizer,
        loaded.model,
        count=request.windows,
        length=request.window_length,
        seed=request.seed + EVALUATION_SEED_OFFSET,
        sequential=True,
    )


def token_batches_of(windows: np.ndarray) -> list[np.ndarray]:
    """The beginnings of the first windows, int64 [1, S] each; logits of more would fill memory."""
    return [window[None, :BATCH_TOKENS] for window in windows[:BATCHES]]


def prompts_of(windows: np.ndarray, count: int) -> np.ndarray:
    """Prompts out of the windows, int64 [count, PROMPT_TOKENS].

    They are the first pieces of all windows, then the second pieces, and so on.

    Raises:
        UsageError: the windows hold fewer pieces.
    """
    pieces = windows.shape[1] // PROMPT_TOKENS
    require_prompts(count, pieces * len(windows))
    cut = windows[:, : pieces * PROMPT_TOKENS].reshape(len(windows), pieces, PROMPT_TOKENS)
    return cut.transpose(1, 0, 2).reshape(-1, PROMPT_TOKENS)[:count]


def describe(request: ValidateRequest, batch: TokenBatch) -> dict[str, Any]:
    """What went in, for the ledger."""
    artefacts = request.artefacts
    return {
        "original": artefacts.original,
        "checkpoint": None if artefacts.checkpoint is None else str(artefacts.checkpoint),
        "onnx": [str(folder) for folder in artefacts.onnx],
        "engines": [str(folder) for folder in artefacts.engines],
        "text": batch.describe(),
    }


def write_reports(ledger: Ledger, output: Path, *, overwrite: bool = False) -> None:
    """Write `ledger.json` and `ledger.html` into the folder `output`.

    Raises:
        UsageError: `output` exists and may not be replaced.
    """
    from validate.report_html import render_html

    with staged_folder(output, overwrite=overwrite) as staging:
        write_json(staging / "ledger.json", ledger.to_json())
        write_text(staging / "ledger.html", render_html(ledger))


def require_passed(ledger: Ledger) -> None:
    """Raise ValidationError when a stage is beyond its tolerance or could not run."""
    failures = ledger.failures
    if failures:
        raise ValidationError(
            f"{len(failures)} of {len(ledger.rows)} stages failed validation.",
            where="; ".join(row.name for row in failures),
            observed="; ".join(reason for row in failures for reason in row.verdict.reasons),
        )
