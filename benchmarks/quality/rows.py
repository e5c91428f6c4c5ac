"""What the tables of quality share: the model, the texts, and rows that others may measure."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from benchmarks.quality.evaluation_texts import tokens_of
from benchmarks.quality.quality_report import DENSE
from benchmarks.quality.recorded_session import RecordedSession
from pipeline.bench.measure import describe_machine, load_average
from pipeline.errors import UsageError
from pipeline.model.load import load_model
from pipeline.progress import note
from pipeline.provenance import provenance
from pipeline.runtime.sessions.session import Session
from pipeline.runtime.sessions.torch_session import TorchSession
from pipeline.workers.workers import InOrder, Result, Workers
from validate.harness import SessionLM
from validate.harness_tasks import load_tasks, score_tasks, scores_of
from validate.metrics import log_perplexity_change, perplexity_with_error
from validate.quality import Quality

_SCHEMA = 1
by_workers = click.option(
    "--workers", metavar="PLACE", help="Who measures rows, such as local:4 or ray://HOST:10001."
)


@dataclass(frozen=True)
class Settings:
    """All that the numbers depend on."""

    model: str
    test: str
    test_sha256: str
    test_windows: int
    test_window_length: int
    calibration: str
    calibration_sha256: str
    questions: str | None
    limit: int | None
    seed: int


def refuse_test_text(settings: Settings) -> None:
    """Raise UsageError when the model would be calibrated on the text it is tested on."""
    if settings.test_sha256 == settings.calibration_sha256:
        raise UsageError(
            "Calibration and test are the same text, so the perplexity would mean nothing.",
            observed=settings.calibration,
            change="calibrate on the validation split, or pass --calibration self",
        )


def require_shared_work(work: Path | None, workers: str | None) -> None:
    """Raise UsageError where rows are measured on machines that do not see the same folder."""
    if workers is not None and work is None and not workers.startswith("local"):
        raise UsageError(
            "Rows that are measured on other machines need a folder that all of them see.",
            where=f"--workers {workers}",
            expected="--work FOLDER",
        )


def open_table(settings: Settings, result: Path, *, resume: bool) -> dict[str, Any]:
    """A new table, or the unfinished one of an earlier run with the same settings.

    Raises:
        UsageError: the earlier run had other settings.
    """
    fresh = {
        "schema": _SCHEMA,
        "settings": asdict(settings),
        "machine": describe_machine() | {"threads": torch.get_num_threads()},
        "provenance": provenance(),
        "rows": [],
    }
    if not resume or not result.is_file():
        return fresh
    earlier: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    if earlier["settings"] != fresh["settings"]:
        changed = [k for k, v in asdict(settings).items() if earlier["settings"].get(k) != v]
        raise UsageError(
            "The rows there were measured with other settings.",
            where=result,
            observed=f"differs in {', '.join(changed)}",
            change="repeat those settings, pass another --json, or leave out --resume",
        )
    return earlier


@dataclass(frozen=True)
class Opening:
    """What a bench is opened from, here or by a worker that sees the same folders.

    Attributes:
        settings: all that the numbers depend on.
        test: the test text.
        calibration: the calibration text, or "self".
        questions: scored as ARC is, if there are any.
        work: where surveys and logits are kept.
    """

    settings: Settings
    test: Path
    calibration: str
    questions: Path | None
    work: Path

    @classmethod
    def of(
        cls, settings: Settings, test: Path, calibration: str, questions: Path | None, work: Path
    ) -> Opening:
        """The same from any folder."""
        text = calibration if calibration == "self" else str(Path(calibration).resolve())
        asked = questions.resolve() if questions else None
        return cls(settings, test.resolve(), text, asked, work.resolve())

    def open(self) -> Bench:
        """The bench, opened once a process."""
        return _opened(self)


@lru_cache(maxsize=1)
def _opened(at: Opening) -> Bench:
    return Bench(at)


class Bench:
    """The model, the texts, and what several rows share."""

    def __init__(self, at: Opening) -> None:
        self.settings, self.calibration, self.work = at.settings, at.calibration, at.work
        self.questions = at.questions
        note(f"loading {self.settings.model}")
        self.loaded = load_model(self.settings.model, dtype=torch.float32)
        self.tests = tokens_of(
            str(at.test),
            self.loaded,
            self.settings.test_windows,
            self.settings.test_window_length,
            self.settings.seed,
            sequential=True,
        )
        session = TorchSession(self.loaded.model, DENSE)
        self.reference = RecordedSession(session, self.work / "logits")

    def question_scores(self, session: Session) -> dict[str, Any] | None:
        """Accuracy and its standard error on the questions; None without any."""
        if self.questions is None:
            return None
        tasks = load_tasks([str(self.questions)])
        model = SessionLM(session, self.loaded.tokenizer)
        results = score_tasks(model, tasks, limit=self.settings.limit, num_fewshot=None)
        return {score.metric: [score.value, score.standard_error] for score in scores_of(results)}


def rows_in_order(
    workers: Workers,
    opening: Opening,
    row_of: Callable[..., dict[str, Any]],
    dense: dict[str, Any],
    cells: Sequence[tuple[Any, str]],
    add: Callable[[dict[str, Any]], None],
) -> None:
    """Let rows be measured, a task each, and add them in their order.

    Args:
        workers: who measures them.
        opening: of the bench.
        row_of: gives the row of (bench, cell, dense row).
        dense: the dense row.
        cells: each with the name of its survey: the first that has one makes it, and the others
            begin behind that.
        add: is given each row.
    """
    first: dict[str, Result[dict[str, Any]]] = {}
    waiting: InOrder[None, dict[str, Any]] = InOrder(workers, lambda _, rows: add(rows[0]))
    for cell, survey in cells:
        row = workers.submit(
            f"row {cell}", _measured, row_of, opening, cell, dense, first.get(survey)
        )
        first.setdefault(survey, row)
        waiting.add(None, [row])
    waiting.finish()


def _measured(
    row_of: Callable[..., dict[str, Any]], opening: Opening, cell: Any, dense: Any, behind: Any
) -> dict[str, Any]:
    """A row, with the load of the machine before and after it; `behind` another that was needed."""
    note(f"{cell} ...")
    bench, loads = opening.open(), [load_average()]
    row = row_of(bench, cell, dense)
    gc.collect()  # a model is a web of cycles, and the next row needs its memory
    return row | {"load_average": [*loads, load_average()]}


def quality_fields(quality: Quality, dense_nlls: np.ndarray | None) -> dict[str, Any]:
    """What the row says of a model's quality."""
    nlls = np.array(quality.window_nlls)
    perplexity, error = perplexity_with_error(nlls)
    change, change_error = log_perplexity_change(nlls if dense_nlls is None else dense_nlls, nlls)
    return {
        "perplexity": perplexity,
        "perplexity_standard_error": error,
        "log_perplexity_change": change,
        "log_perplexity_change_standard_error": change_error,
        "kl_to_dense": 0.0 if quality.kl is None else quality.kl,
        "top1_to_dense": 1.0 if quality.top1 is None else quality.top1,
        "window_nlls": quality.window_nlls,
        "measure_seconds": quality.seconds,
    }
