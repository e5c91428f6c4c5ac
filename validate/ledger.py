"""Run the same inputs through every stage, one after the other, and write down what came out.

The loop knows no task. An `Adapter` gives all that it, the stages and the reports leave open.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pipeline.errors import PipelineError, UsageError
from pipeline.memory import return_free_memory
from pipeline.model.task import Task
from validate.artefacts import Artefacts
from validate.compare import Comparison, StageLogits
from validate.record import Row
from validate.stages import Openers, Stage, Tolerance
from validate.verdict import Verdict

_logger = logging.getLogger(__name__)


class Options(Protocol):
    """On what, and on how much of it, a model of the task is validated."""

    @property
    def task(self) -> Task:
        """Which task."""
        ...

    def check(self, artefacts: Artefacts) -> None:
        """Refuse, before anything is loaded, what cannot be meant or does not fit an artefact.

        Raises:
            UsageError: says which option.
        """
        ...


class _Outputs(Protocol):
    """What a stage answered, kept for as long as a later stage is compared with it."""

    @property
    def logits(self) -> StageLogits:
        """One row of logits for each token or image."""
        ...

    @property
    def cached(self) -> StageLogits | None:
        """Logits of tokens behind a cache; None where the task has no cache."""
        ...

    def complaints(self, tolerance: Tolerance, reference: Any | None) -> list[str]:
        """What is wrong with them, beside their logits.

        Args:
            tolerance: what is demanded of the stage.
            reference: outputs of the stage it should equal; None if that one did not run.
        """
        ...

    def row_fields(self, reference: Any | None, original: Any | None) -> dict[str, Any]:
        """What the stage's row says beside its logits, given the outputs of two others.

        Args:
            reference: of the stage it should equal; None if that one did not run.
            original: of the original; None if that one did not run, or is this stage.
        """
        ...


@dataclass(frozen=True)
class Loaded:
    """The original in memory, and what every stage will be given.

    Attributes:
        model: in float32.
        inputs: of every stage, as the task measures them; their `describe()` is for the ledger.
        source: what the ledger says of where they came from.
    """

    model: Any
    inputs: Any
    source: dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of the report.

    Attributes:
        title: its head.
        help: what the number means.
        text: the cell of a row; None where it was not measured.
    """

    title: str
    help: str
    text: Callable[[Row], str | None]


@dataclass(frozen=True)
class Drawn:
    """The measure of a task that is drawn with its standard error.

    Attributes:
        title: of the plot.
        value: of a row, and its standard error; None where it was not measured.
        limits: of the axis; None for those of the values.
    """

    title: str
    value: Callable[[Row], tuple[float, float | None] | None]
    limits: tuple[float, float] | None = None


@dataclass(frozen=True)
class Adapter:
    """A task, as the ledger needs to know it.

    Attributes:
        options: of the original's name and the flags of `skipcat validate`, as keywords; raises
            UsageError for those of another task.
        load: loads the original and makes the inputs, of its name, the options, the seed, whether
            its own Python code may run, and what to tell of progress.
        openers: what opens the other stages.
        measure: takes everything from an open session, given the stage's name, the session, the
            inputs and, by name, the outputs that it will be compared with.
        item: what a row of logits is of.
        per_item: the unit of figures an item.
        top1: what the column of top-1 agreement means.
        columns: of the report, beside those that every task has.
        kl_item: what a figure of KL is of, where that is no row of logits.
        agreement: the head of the column that `top1` is about.
        drawn: the measure that is plotted.
    """

    options: Callable[..., Options]
    load: Callable[[str, Any, int, bool, Callable[[str], None]], Loaded]
    openers: Openers
    measure: Callable[[str, Any, Any, Mapping[str, Any]], _Outputs]
    item: str
    per_item: str
    top1: str
    columns: tuple[Column, ...]
    drawn: Drawn
    kl_item: str | None = None
    agreement: str = "top-1"


def run_ledger(
    stages: Sequence[Stage],
    inputs: Any,
    adapter: Adapter,
    *,
    strict: bool = False,
    progress: Callable[[str], None] = lambda message: None,
) -> list[Row]:
    """Run and compare all stages; the first one is the original.

    Args:
        stages: in the order of the pipeline; a reference comes before what refers to it.
        inputs: what each is given, as `adapter.measure` takes it.
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
    kept: dict[str, _Outputs] = {}
    rows = []
    for i, stage in enumerate(stages):
        progress(f"[{i + 1}/{len(stages)}] {stage.name}")
        stage.ready()
        rows.append(_run_stage(stage, inputs, adapter, kept, original, strict=strict))
        needed = {name for later in stages[i + 1 :] for name in (later.reference, original)}
        for name in set(kept) - needed:
            del kept[name]
        gc.collect()  # a session's graph of objects holds its weights
        return_free_memory()
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
    inputs: Any,
    adapter: Adapter,
    kept: dict[str, _Outputs],
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
        row = _row_of(stage, adapter, outputs, watched, original)
    except PipelineError as error:
        verdict = Verdict.not_run(str(error), required=stage.required or strict)
        return Row(stage.name, stage.reference, stage.tolerance, verdict)
    except Exception as error:
        _logger.exception("stage '%s' broke", stage.name)
        verdict = Verdict.not_run(f"internal error: {type(error).__name__}: {error}", required=True)
        return Row(stage.name, stage.reference, stage.tolerance, verdict)
    kept[stage.name] = outputs
    return replace(row, total_s=time.perf_counter() - start)


def _row_of(
    stage: Stage, task: Adapter, outputs: _Outputs, watched: Mapping[str, _Outputs], original: str
) -> Row:
    """The row of a stage that ran, but for how long it took."""
    reference = stage.reference or ""
    to_reference, to_original = _compared(
        stage, outputs.logits, {name: other.logits for name, other in watched.items()}, original
    )
    cached: tuple[Comparison | None, Comparison | None] = (None, None)
    if outputs.cached is not None:
        others = {name: o.cached for name, o in watched.items() if o.cached is not None}
        cached = _compared(stage, outputs.cached, others, original)
    verdict = Verdict.judge(
        stage.tolerance,
        to_reference,
        to_original,
        outputs.complaints(stage.tolerance, watched.get(reference)),
        item=task.item,
        kl_item=task.kl_item,
        is_original=stage.name == original,
        cached=cached,
    )
    return Row(
        name=stage.name,
        reference=stage.reference,
        tolerance=stage.tolerance,
        verdict=verdict,
        to_reference=to_reference,
        to_original=to_original,
        cached_to_reference=cached[0],
        cached_to_original=cached[1],
        inference_s=outputs.logits.inference_s,
        **outputs.row_fields(watched.get(reference), watched.get(original)),
    )


def _compared(
    stage: Stage, logits: StageLogits, others: Mapping[str, StageLogits], original: str
) -> tuple[Comparison | None, Comparison | None]:
    """Logits of a stage against those of its reference and of the original, where these ran."""
    comparisons = {
        name: logits.compare(other, stage.tolerance if name == stage.reference else Tolerance())
        for name, other in others.items()
    }
    return comparisons.get(stage.reference or ""), comparisons.get(original)
