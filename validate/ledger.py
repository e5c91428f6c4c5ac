"""Run the same inputs through every stage, one after the other, and write down what came out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from pipeline.errors import PipelineError, UsageError
from validate.adapter import Adapter, Inputs, Outputs
from validate.compare import compare_stages
from validate.record import Row
from validate.stages import Stage, Tolerance
from validate.verdict import judge, not_run

_logger = logging.getLogger(__name__)


def run_ledger(
    stages: Sequence[Stage],
    inputs: Inputs,
    adapter: Adapter,
    *,
    strict: bool = False,
    progress: Callable[[str], None] = lambda message: None,
) -> list[Row]:
    """Run and compare all stages; the first one is the original.

    Args:
        stages: in the order of the pipeline; a reference comes before what refers to it.
        inputs: what each is given.
        adapter: of the task; measures a stage.
        strict: let every stage that cannot run count as a failure.
        progress: is told which stage starts.

    Returns:
        One row per stage, also for a stage that could not run.

    Raises:
        UsageError: no stage, a name twice, or a reference that is not an earlier stage.
    """
    _require_order(stages)
    original = stages[0].name
    kept: dict[str, Outputs] = {}
    rows = []
    for i, stage in enumerate(stages):
        progress(f"[{i + 1}/{len(stages)}] {stage.name}")
        rows.append(_run_stage(stage, inputs, adapter, kept, original, strict=strict))
        needed = {name for later in stages[i + 1 :] for name in (later.reference, original)}
        for name in set(kept) - needed:
            del kept[name]
    return rows


def _require_order(stages: Sequence[Stage]) -> None:
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


def _run_stage(
    stage: Stage,
    inputs: Inputs,
    adapter: Adapter,
    kept: dict[str, Outputs],
    original: str,
    *,
    strict: bool,
) -> Row:
    """Load one stage, measure it, compare it; its outputs are added to `kept`.

    Whatever goes wrong in a stage becomes its row, so that one broken backend does not cost the
    measurements of all others.
    """
    start = time.perf_counter()
    names = dict.fromkeys((stage.reference, original))
    watched = {name: kept[name] for name in names if name in kept}
    try:
        # No name here holds the session, so that it goes once it is measured.
        outputs = adapter.measure(stage.name, stage.open(), inputs, watched)
        row = _row_of(stage, adapter.item, outputs, watched, original)
    except PipelineError as error:
        verdict = not_run(str(error), required=stage.required or strict)
        return Row(stage.name, stage.reference, stage.tolerance, verdict)
    except Exception as error:
        _logger.exception("stage '%s' broke", stage.name)
        verdict = not_run(f"internal error: {type(error).__name__}: {error}", required=True)
        return Row(stage.name, stage.reference, stage.tolerance, verdict)
    kept[stage.name] = outputs
    return replace(row, total_s=time.perf_counter() - start)


def _row_of(
    stage: Stage, item: str, outputs: Outputs, watched: Mapping[str, Outputs], original: str
) -> Row:
    """The row of a stage that ran, but for how long it took."""
    comparisons = {
        name: compare_stages(
            outputs.logits,
            other.logits,
            stage.tolerance if name == stage.reference else Tolerance(),
        )
        for name, other in watched.items()
    }
    reference = stage.reference or ""
    to_reference, to_original = comparisons.get(reference), comparisons.get(original)
    return Row(
        name=stage.name,
        reference=stage.reference,
        tolerance=stage.tolerance,
        verdict=judge(
            stage.tolerance,
            to_reference,
            to_original,
            outputs.complaints(),
            item=item,
            is_original=stage.name == original,
        ),
        to_reference=to_reference,
        to_original=to_original,
        inference_s=outputs.logits.inference_s,
        **outputs.row_fields(watched.get(reference), watched.get(original)),
    )
