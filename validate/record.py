"""The ledger as data: rows, and their JSON form."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, ValidationError
from pipeline.json_file import json_field, read_json_object
from pipeline.model.task import TEXT, Task
from validate.compare import Comparison
from validate.greedy import GreedyAgreement
from validate.metrics import LogitMetrics
from validate.quality import Perplexity
from validate.rounding import Rounding
from validate.stages import Tolerance
from validate.verdict import Verdict

_SCHEMA = 1
_AGAIN = "run `skipcat validate` again"


@dataclass(frozen=True)
class PerplexityChange:
    """Perplexity of a stage against the original's, on the same windows.

    Attributes:
        log_ratio: log(stage / original); 0.01 is one per cent worse.
        standard_error: of `log_ratio`, paired by window; None for a single window.
    """

    log_ratio: float
    standard_error: float | None


@dataclass(frozen=True)
class Accuracy:
    """Share of labelled images that a stage classifies as labelled.

    Attributes:
        value: in [0, 1].
        standard_error: of it, images as independent.
        images: how many.
    """

    value: float
    standard_error: float
    images: int


@dataclass(frozen=True)
class DrivingScores:
    """What a driving network sees in the images, against their labels and the original.

    Attributes:
        images: how many.
        scores: as `pipeline.driving.scores.scores_of` names them; empty without labels.
        standard_errors: of the chief ones, by the bootstrap over images.
        to_original: as `pipeline.driving.scores.agreement` names it; None for the original.
    """

    images: int
    scores: dict[str, float | None]
    standard_errors: dict[str, float | None]
    to_original: dict[str, float | None] | None


@dataclass(frozen=True)
class Row:
    """One stage of the ledger. What was not measured is None.

    Attributes:
        name: of the stage.
        reference: name of the stage it should equal; None for the original.
        tolerance: how nearly.
        verdict: pass, fail, measured or not run, and why.
        to_reference: its logits against the reference's.
        to_original: its logits against the original's.
        greedy_to_reference: its answers against the reference's.
        greedy_to_original: its answers against the original's.
        perplexity: on the evaluation windows.
        perplexity_change: against the original.
        inference_s: seconds for the token batches.
        total_s: seconds for loading and all measurements.
        accuracy: of an image classifier, where there are labels.
        cached_to_reference: its logits of tokens behind a cache, against the reference's.
        cached_to_original: the same against the original's.
        answer: of a language model, to the question in the ledger's inputs.
        driving: of a driving network.
    """

    name: str
    reference: str | None
    tolerance: Tolerance
    verdict: Verdict
    to_reference: Comparison | None = None
    to_original: Comparison | None = None
    greedy_to_reference: GreedyAgreement | None = None
    greedy_to_original: GreedyAgreement | None = None
    perplexity: Perplexity | None = None
    perplexity_change: PerplexityChange | None = None
    inference_s: float | None = None
    total_s: float | None = None
    accuracy: Accuracy | None = None
    cached_to_reference: Comparison | None = None
    cached_to_original: Comparison | None = None
    answer: str | None = None
    driving: DrivingScores | None = None

    @property
    def closeness(self) -> Comparison | None:
        """The comparison that its errors are reported from: the reference, else the original."""
        return self.to_reference or self.to_original


@dataclass(frozen=True)
class Ledger:
    """Every stage on the same inputs.

    Attributes:
        rows: in the order of the pipeline, the original first.
        inputs: what went in: counts, lengths and where the text came from.
        provenance: of the tool and its libraries.
        rounding: what is quantised, and what that cost when it was made; None for nothing.
    """

    rows: list[Row]
    inputs: dict[str, Any]
    provenance: dict[str, Any]
    rounding: Rounding | None = None

    @property
    def answers(self) -> list[tuple[str, str]]:
        """What each stage said to the question, by its name; empty where none was asked."""
        return [(row.name, row.answer) for row in self.rows if row.answer is not None]

    @property
    def task(self) -> Task:
        """What its models are for."""
        return self.inputs.get("task", TEXT)

    @property
    def failures(self) -> list[Row]:
        """The rows that make the ledger fail."""
        return [row for row in self.rows if row.verdict.counts_as_failure]

    def require_passed(self) -> None:
        """Raise ValidationError when a stage is beyond its tolerance or could not run."""
        failures = self.failures
        if failures:
            raise ValidationError(
                f"{len(failures)} of {len(self.rows)} stages failed validation.",
                where="; ".join(row.name for row in failures),
                observed="; ".join(reason for row in failures for reason in row.verdict.reasons),
            )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; NaN and infinities, which JSON lacks, become their names."""
        return {
            "schema": _SCHEMA,
            "passed": not self.failures,
            "rows": [_spell_out(asdict(row)) for row in self.rows],
            "inputs": self.inputs,
            "provenance": self.provenance,
            "rounding": None if self.rounding is None else asdict(self.rounding),
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any], where: object = "ledger.json") -> Ledger:
        """The ledger that `to_json` was called on.

        Raises:
            InputError: written under another schema, or broken.
        """
        if fields.get("schema") != _SCHEMA:
            raise InputError(
                "This ledger was written by another version of skipcat.",
                observed=f"schema {fields.get('schema')}",
                expected=f"schema {_SCHEMA}",
                change=_AGAIN,
            )
        try:
            rows = [_row_from_json(row) for row in json_field(fields, "rows", list, where)]
            kept = json_field(fields, "rounding", dict, where, default=None)
            rounding = None if kept is None else Rounding(**kept)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                "This ledger is broken.",
                where=where,
                observed=f"{type(error).__name__}: {error}",
                change=_AGAIN,
            ) from error
        inputs, made = (json_field(fields, n, dict, where) for n in ("inputs", "provenance"))
        return cls(rows, inputs, made, rounding)

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """The ledger of a ledger.json.

        Raises:
            InputError: it is missing, broken, or written under another schema.
        """
        return cls.from_json(read_json_object(path, change=_AGAIN), path)


def _row_from_json(fields: dict[str, Any]) -> Row:
    """The Row of one entry of `rows`."""
    fields = _read_numbers(fields)

    def build(name: str, kind: Any) -> Any:
        return None if fields.get(name) is None else kind(**fields[name])

    return Row(
        **{
            **fields,
            "tolerance": Tolerance(**fields["tolerance"]),
            "verdict": Verdict(**fields["verdict"]),
            "to_reference": _comparison_from_json(fields["to_reference"]),
            "to_original": _comparison_from_json(fields["to_original"]),
            "cached_to_reference": _comparison_from_json(fields.get("cached_to_reference")),
            "cached_to_original": _comparison_from_json(fields.get("cached_to_original")),
            "greedy_to_reference": build("greedy_to_reference", GreedyAgreement),
            "greedy_to_original": build("greedy_to_original", GreedyAgreement),
            "perplexity": build("perplexity", Perplexity),
            "perplexity_change": build("perplexity_change", PerplexityChange),
            "accuracy": build("accuracy", Accuracy),
            "driving": build("driving", DrivingScores),
        }
    )


def _comparison_from_json(fields: dict[str, Any] | None) -> Comparison | None:
    """The Comparison of its JSON form."""
    if fields is None:
        return None
    return Comparison(**{**fields, "metrics": LogitMetrics(**fields["metrics"])})


_NOT_JSON = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def _spell_out(value: Any) -> Any:
    """Replace every non-finite float within `value` by its name."""
    if isinstance(value, dict):
        return {key: _spell_out(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_spell_out(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _read_numbers(value: Any) -> Any:
    """Undo `_spell_out`."""
    if isinstance(value, dict):
        return {key: _read_numbers(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_read_numbers(entry) for entry in value]
    return _NOT_JSON.get(value, value) if isinstance(value, str) else value
