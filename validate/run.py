"""The command: artefacts and inputs in, a ledger out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.model.task import adapter_of, task_of_model
from pipeline.provenance import provenance, public_name
from validate.artefacts import Artefacts
from validate.ledger import Adapter, Options, run_ledger
from validate.record import Ledger
from validate.rounding import Rounding
from validate.stages import ORIGINAL, Stage, standard_stages


@dataclass(frozen=True)
class ValidateRequest:
    """What to validate, and on what.

    Attributes:
        artefacts: the stages' files.
        options: the inputs, as the task of the original takes them: `validate.decoder.TextOptions`
            or `validate.classifier.ImageOptions`.
        max_kl: most KL to the original, nats per token or image; None sets no limit.
        strict: let an engine that cannot run here count as a failure.
        seed: decides the generated text, or which images are drawn.
        trust_remote_code: let Python code of the original and the checkpoint run.
    """

    artefacts: Artefacts
    options: Options
    max_kl: float | None = None
    strict: bool = False
    seed: int = 0
    trust_remote_code: bool = False

    @classmethod
    def of(
        cls,
        artefacts: Artefacts,
        *,
        max_kl: float | None = None,
        strict: bool = False,
        seed: int = 0,
        trust_remote_code: bool = False,
        **inputs: Any,
    ) -> ValidateRequest:
        """The request with `inputs` as the task of the original takes them, `text` or `images`.

        Raises:
            UsageError: inputs of another task.
        """
        adapter: Adapter = adapter_of(task_of_model(artefacts.original), "ledger")
        options = adapter.options(artefacts.original, **inputs)
        return cls(artefacts, options, max_kl, strict, seed, trust_remote_code)


def validate(
    request: ValidateRequest,
    progress: Callable[[str], None] = lambda message: None,
    ready: Callable[[], object] = lambda: None,
) -> Ledger:
    """Run the ledger.

    Args:
        request: what, and on what.
        progress: is told what is done.
        ready: waits for an engine that is still being built; what it raises ends the ledger.

    Raises:
        InputError: the original or the inputs do not load, or do not fit each other.
        UsageError: too few tokens asked for, more than an export's cache holds, or no images.
    """
    artefacts = request.artefacts
    request.options.check(artefacts)
    adapter: Adapter = adapter_of(request.options.task, "ledger")
    progress(f"loading {artefacts.original}")
    stages, inputs, source = _prepare(request, adapter, progress, ready)
    rows = run_ledger(stages, inputs, adapter, strict=request.strict, progress=progress)
    named = {
        "original": public_name(artefacts.original),
        "checkpoint": None if artefacts.checkpoint is None else public_name(artefacts.checkpoint),
        **({"beside": [public_name(f) for f in artefacts.beside]} if artefacts.beside else {}),
        "onnx": [public_name(folder) for folder in artefacts.onnx],
        "engines": [public_name(folder) for folder in artefacts.engines],
    }
    rounding = None if artefacts.checkpoint is None else Rounding.read(artefacts.checkpoint)
    return Ledger(rows, inputs.describe() | named | source, provenance(), rounding)


def _prepare(
    request: ValidateRequest,
    adapter: Adapter,
    progress: Callable[[str], None],
    ready: Callable[[], object],
) -> tuple[list[Stage], Any, dict[str, Any]]:
    """The stages, what each is given, and where that came from.

    The original is loaded once, for the inputs and for its own stage, and only that stage holds it.
    """
    artefacts, code = request.artefacts, request.trust_remote_code
    loaded = adapter.load(artefacts.original, request.options, request.seed, code, progress)
    held = [loaded.model]
    stages = standard_stages(
        artefacts,
        adapter.openers,
        lambda: adapter.openers.model(held.pop(), ORIGINAL),
        request.max_kl,
        code,
        ready,
    )
    return stages, loaded.inputs, loaded.source
