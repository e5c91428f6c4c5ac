"""What a task gives the ledger: everything that the loop, the stages and the reports leave open."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.model.task import Task
from validate.compare import StageLogits
from validate.record import Row
from validate.stages import Artefacts, Openers

Tell = Callable[[str], None]


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


class Inputs(Protocol):
    """What every stage is given."""

    def describe(self) -> dict[str, Any]:
        """What the ledger says of them."""
        ...


class Outputs(Protocol):
    """What a stage answered, kept for as long as a later stage is compared with it."""

    @property
    def logits(self) -> StageLogits:
        """One row of logits for each token or image."""
        ...

    def complaints(self) -> list[str]:
        """What is wrong with them whatever the tolerance, beside logits that are not finite."""
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
        inputs: of every stage.
        source: what the ledger says of where they came from.
    """

    model: Any
    inputs: Inputs
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
        top1: what agreement in the likeliest item means.
        columns: of the report, beside those that every task has.
        drawn: the measure that is plotted.
    """

    options: Callable[..., Options]
    load: Callable[[str, Any, int, bool, Tell], Loaded]
    openers: Openers
    measure: Callable[[str, Any, Any, Mapping[str, Any]], Outputs]
    item: str
    per_item: str
    top1: str
    columns: tuple[Column, ...]
    drawn: Drawn
