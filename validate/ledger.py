"""Run the same inputs through every stage, one after the other, and write down what came out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import PipelineError, UsageError
from pipeline.provenance import provenance
from validate.compare import Comparison, StageLogits, compare_stages, run_batches
from validate.greedy import GreedyAgreement, GreedyTrace, agreement, trace_greedy
from validate.metrics import log_perplexity_change
from validate.perplexity import Perplexity, measure_perplexity
from validate.record import Ledger, PerplexityChange, Row
from validate.stages import Stage, Tolerance
from validate.verdict import judge, not_run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """What every stage is given.

    Attributes:
        token_batches: int64 [B, S] each; their logits are compared token by token.
        windows: int64 [W, L]; for the perplexity.
        prompts: int64 [P, S]; for greedy decoding.
        max_new_tokens: tokens decoded per prompt.
    """

    token_batches: Sequence[np.ndarray]
    windows: np.ndarray
    prompts: np.ndarray
    max_new_tokens: int = 64

    def describe(self) -> dict[str, Any]:
        """Counts and lengths, for the ledger."""
        return {
            "token_batches": [list(batch.shape) for batch in self.token_batches],
            "windows": list(self.windows.shape),
            "prompts": list(self.prompts.shape),
            "max_new_tokens": self.max_new_tokens,
        }


@dataclass(frozen=True)
class Outputs:
    """What a stage answered, kept for as long as a later stage is compared with it."""

    logits: StageLogits
    perplexity: Perplexity
    traces: list[GreedyTrace]


def run_ledger(
    stages: Sequence[Stage],
    token_batches: Sequence[np.ndarray],
    windows: np.ndarray,
    prompts: np.ndarray,
    tolerances: Mapping[str, Tolerance] | None = None,
    *,
    max_new_tokens: int = 64,
    strict: bool = False,
    description: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Ledger:
    """Run and compare all stages; the first one is the original.

    Args:
        stages: in the order of the pipeline; a reference comes before what refers to it.
        token_batches: int64 [B, S] each.
        windows: int64 [W, L].
        prompts: int64 [P, S].
        tolerances: replacements by stage name.
        max_new_tokens: tokens decoded per prompt.
        strict: let every stage that cannot run count as a failure.
        description: what else the ledger should say about its inputs.
        progress: is told which stage starts.

    Returns:
        One row per stage, also for a stage that could not run.

    Raises:
        UsageError: no stage, a name twice, or a reference that is not an earlier stage.
    """
    require_order(stages)
    inputs = Inputs(token_batches, windows, prompts, max_new_tokens)
    kept: dict[str, Outputs] = {}
    rows = []
    for i, stage in enumerate(stages):
        progress(f"[{i + 1}/{len(stages)}] {stage.name}")
        tolerance = (tolerances or {}).get(stage.name, stage.tolerance)
        rows.append(run_stage(stage, tolerance, inputs, stages[0].name, kept, strict=strict))
        needed = {stages[0].name, *(later.reference for later in stages[i + 1 :])}
        for name in set(kept) - needed:
            del kept[name]
    return Ledger(rows, {**inputs.describe(), **(description or {})}, provenance())


def require_order(stages: Sequence[Stage]) -> None:
    """Raise UsageError when stages cannot be run in this order."""
    if not stages:
        raise UsageError("There is no stage to validate.")
    seen: set[str | None] = {None}
    for stage in stages:
        if stage.name in seen:
            raise UsageError("Two stages have the same name.", observed=stage.name)
        if stage.reference not in seen:
            raise UsageError(
                "A stage refers to one that does not come before it.",
                where=stage.name,
                observed=stage.reference,
            )
        seen.add(stage.name)


def run_stage(
    stage: Stage,
    tolerance: Tolerance,
    inputs: Inputs,
    original: str,
    kept: dict[str, Outputs],
    *,
    strict: bool,
) -> Row:
    """Load one stage, measure it, compare it; its outputs are added to `kept`.

    Whatever goes wrong in a stage becomes its row, so that one broken backend does not cost the
    measurements of all others.
    """
    start = time.perf_counter()
    watched = [name for name in dict.fromkeys((stage.reference, original)) if name in kept]
    try:
        outputs = measure(stage, inputs, [kept[name].traces for name in watched])
        row = compare(stage, tolerance, outputs, original, kept, watched, start)
    except PipelineError as error:
        verdict = not_run(str(error), required=stage.required or strict)
        return Row(stage.name, stage.reference, tolerance, verdict)
    except Exception as error:
        logger.exception("stage '%s' broke", stage.name)
        verdict = not_run(f"internal error: {type(error).__name__}: {error}", required=True)
        return Row(stage.name, stage.reference, tolerance, verdict)
    kept[stage.name] = outputs
    return row


def measure(stage: Stage, inputs: Inputs, watched: Sequence[Sequence[GreedyTrace]]) -> Outputs:
    """Load the stage once, take everything from it, and let go of it."""
    session = stage.open()
    return Outputs(
        logits=run_batches(stage.name, session, inputs.token_batches),
        perplexity=measure_perplexity(session, inputs.windows),
        traces=trace_greedy(session, inputs.prompts, inputs.max_new_tokens, watched),
    )


def compare(
    stage: Stage,
    tolerance: Tolerance,
    outputs: Outputs,
    original: str,
    kept: Mapping[str, Outputs],
    watched: list[str],
    start: float,
) -> Row:
    """The row of a stage that ran since `start`, on the clock of `time.perf_counter`."""
    comparisons = {name: compare_stages(outputs.logits, kept[name].logits) for name in watched}
    answers = {
        name: agreement(name, outputs.traces, kept[name].traces, i)
        for i, name in enumerate(watched)
    }
    to_reference: Comparison | None = comparisons.get(stage.reference or "")
    to_original: Comparison | None = comparisons.get(original)
    greedy_to_reference: GreedyAgreement | None = answers.get(stage.reference or "")
    verdict = judge(
        tolerance,
        to_reference,
        to_original,
        outputs.perplexity.value,
        is_original=stage.name == original,
    )
    return Row(
        name=stage.name,
        reference=stage.reference,
        tolerance=tolerance,
        verdict=verdict,
        to_reference=to_reference,
        to_original=to_original,
        greedy_to_reference=greedy_to_reference,
        greedy_to_original=answers.get(original),
        perplexity=outputs.perplexity,
        perplexity_change=perplexity_change(outputs, kept.get(original)),
        inference_s=outputs.logits.inference_s,
        total_s=time.perf_counter() - start,
    )


def perplexity_change(outputs: Outputs, original: Outputs | None) -> PerplexityChange | None:
    """Perplexity against the original's; None for the original and when it did not run."""
    if original is None:
        return None
    change, error = log_perplexity_change(
        np.array(original.perplexity.window_nlls), np.array(outputs.perplexity.window_nlls)
    )
    return PerplexityChange(change, error)
