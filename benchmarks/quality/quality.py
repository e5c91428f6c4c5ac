"""Quality of every method at every budget: ours, and the rivals as methods of ours.

    python -m benchmarks.quality.quality --test TEST.txt \
        --calibration VALID.txt

Perplexity on the first windows of the test text, each on an empty cache, with no special tokens;
every window predicts its own tokens after the first. Model and factors in float32. Each row is an
ordinary run of what `skipcat compress` does, on a copy of the model; its seconds hold all but
loading and saving. Rows of one effort have the same calibration tokens. The JSON is written after
every row, and `--resume` goes on from it.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from benchmarks import RESULTS
from benchmarks.command import run
from benchmarks.quality.evaluation_texts import hash_of_text, tokens_of
from benchmarks.quality.quality_report import DENSE, save_chart, show
from benchmarks.quality.rows import (
    Bench,
    Opening,
    Settings,
    by_workers,
    open_table,
    quality_fields,
    refuse_test_text,
    require_shared_work,
    rows_in_order,
)
from pipeline.artefact import write_json
from pipeline.bench.measure import load_average
from pipeline.calibrate.text import TokenBatch
from pipeline.compress.decoder import CalibratedDecoder
from pipeline.compress.methods import DEFAULT_EFFORT, DEFAULT_METHOD, METHODS
from pipeline.compress.plan.layer_costs import LayerCosts
from pipeline.compress.plan.make_plan import make_plan
from pipeline.compress.plan.plan import RankPlan
from pipeline.compress.request import CompressRequest
from pipeline.compress.run import parameter_count
from pipeline.compress.walk import compress_
from pipeline.errors import UsageError
from pipeline.model.structure import Layer, decoder_structure
from pipeline.progress import note
from pipeline.runtime.sessions.torch_session import TorchSession
from pipeline.workers.workers import Workers, open_workers
from validate.quality import measure_quality

_RESULT = RESULTS / "quality.json"
_SWEEP = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
_TABLE = (0.8, 0.7)
_SWEPT = ("skipcat", DEFAULT_METHOD)
_ASKED = ("svd-llm", *_SWEPT)


@dataclass(frozen=True)
class _Cell:
    """One row to measure: a method at a budget, with the calibration of an effort."""

    method: str
    keep: float
    effort: str = DEFAULT_EFFORT

    def __str__(self) -> str:
        return f"{self.method} at {self.keep}, {self.effort}"


def _is_asked(cell: _Cell) -> bool:
    """Whether the questions are put to this row; they take longer than the text."""
    return cell.method in _ASKED and cell.keep == _TABLE[0] and cell.effort == DEFAULT_EFFORT


def _all_cells() -> list[_Cell]:
    """Every row, those that the README shows first.

    All methods meet at the effort "fast", on the same tokens; ours and those it is held against
    get more text besides.
    """
    cells = [_Cell(method, keep) for keep in _TABLE for method in _ASKED]
    cells += [_Cell(method, _TABLE[0], "fast") for method in METHODS if method != "mpifa"]
    cells += [_Cell(method, keep, "fast") for keep in _SWEEP for method in _SWEPT]
    cells += [_Cell(method, _TABLE[1], "fast") for method in METHODS if method != "mpifa"]
    cells += [_Cell("mpifa", keep, "fast") for keep in _TABLE]
    cells += [_Cell(DEFAULT_METHOD, keep, "max") for keep in _TABLE]
    return list(dict.fromkeys(cells))


@click.command()
@click.option("--test", type=click.Path(path_type=Path), required=True, help="Test text, UTF-8.")
@click.option("--calibration", required=True, help="Calibration text, or 'self'.")
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--questions", type=click.Path(path_type=Path), help="JSONL, scored as ARC is.")
@click.option("--limit", type=click.IntRange(min=1), default=300, help="First questions only.")
@click.option("--only", default="", help="Rows, such as skipcat:0.8,skipcat-kl:0.7:fast.")
@click.option("--work", type=click.Path(path_type=Path), help="Keep surveys and logits here.")
@click.option("--test-windows", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--test-window-length", type=click.IntRange(min=2), default=2048, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "result", type=click.Path(path_type=Path), default=_RESULT)
@click.option("--resume", is_flag=True, help="Keep the rows that the JSON has already.")
@by_workers
def command(
    test: Path,
    calibration: str,
    model: str,
    questions: Path | None,
    limit: int,
    only: str,
    work: Path | None,
    test_windows: int,
    test_window_length: int,
    seed: int,
    result: Path,
    resume: bool,
    workers: str | None,
) -> None:
    """Measure perplexity and agreement of every method at every budget."""
    settings = Settings(
        model=model,
        test=test.name,
        test_sha256=hash_of_text(test),
        test_windows=test_windows,
        test_window_length=test_window_length,
        calibration=Path(calibration).name,
        calibration_sha256="" if calibration == "self" else hash_of_text(Path(calibration)),
        questions=questions.name if questions else None,
        limit=limit if questions else None,
        seed=seed,
    )
    refuse_test_text(settings)
    require_shared_work(work, workers)
    table = open_table(settings, result, resume=resume)
    cells = [_parsed_cell(text) for text in only.split(",")] if only else _all_cells()
    with tempfile.TemporaryDirectory() as scratch, open_workers(workers) as own:
        opening = Opening.of(settings, test, calibration, questions, work or Path(scratch))
        _measure_table(opening, cells, table, result, own)
    show(table)
    save_chart(table["rows"], result.with_suffix(".svg"))


def _parsed_cell(text: str) -> _Cell:
    """A row from "method:keep" or "method:keep:effort".

    Raises:
        UsageError: it is neither.
    """
    method, _, rest = text.partition(":")
    keep, _, effort = rest.partition(":")
    try:
        return _Cell(method, float(keep), effort or DEFAULT_EFFORT)
    except ValueError as error:
        raise UsageError(
            "This is not a row.", where="--only", observed=text, expected="method:keep[:effort]"
        ) from error


def _measure_table(
    opening: Opening, cells: list[_Cell], table: dict[str, Any], result: Path, workers: Workers
) -> None:
    """Measure every row that `table` lacks, and write it to `result` as it is finished."""
    bench = opening.open()
    table["texts"] = {"test": bench.tests.describe()}
    finished = {(row["method"], row["keep"], row["effort"]) for row in table["rows"]}
    if (DENSE, 1.0, None) not in finished:
        loads = [load_average()]
        _add_row(table, result, _dense_row(bench) | {"load_average": [*loads, load_average()]})
    dense = next(row for row in table["rows"] if row["method"] == DENSE)
    missing = [c for c in cells if (c.method, c.keep, c.effort) not in finished]
    rows_in_order(
        workers,
        opening,
        _compressed_row,
        dense,
        [(cell, cell.effort) for cell in missing],
        partial(_add_row, table, result),
    )
    table["computed_by"] = workers.describe()
    write_json(result, table)


def _add_row(table: dict[str, Any], result: Path, row: dict[str, Any]) -> None:
    """Write the table with another row."""
    table["rows"].append(row)
    result.parent.mkdir(parents=True, exist_ok=True)
    write_json(result, table)
    note(f"{row['method']}: perplexity {row['perplexity']:.2f}")


def _dense_row(bench: Bench) -> dict[str, Any]:
    """The row of the model as it is."""
    layers = decoder_structure(bench.loaded.model)
    linear = sum(sum(g.out_features) * g.in_features for layer in layers for g in layer.groups)
    quality = measure_quality(bench.reference, None, bench.tests.tokens.numpy(), note)
    return {
        "method": DENSE,
        "keep": 1.0,
        "effort": None,
        "kept_fraction": 1.0,
        "decoder_linear_parameters": linear,
        "parameters": parameter_count(bench.loaded.model),
        **quality_fields(quality, None),
        "questions": bench.question_scores(bench.reference.session),
        "plan_seconds": None,
        "compress_seconds": None,
        "largest_interpolation": None,
    }


def _request(bench: Bench, cell: _Cell) -> CompressRequest:
    """What `skipcat compress` would be asked."""
    request = CompressRequest(
        bench.settings.model,
        cell.keep,
        method=cell.method,
        effort=cell.effort,
        calibration=bench.calibration,
        seed=bench.settings.seed,
    )
    request.check()
    return request


def _compressed_row(bench: Bench, cell: _Cell, dense: dict[str, Any]) -> dict[str, Any]:
    """The row of one method: compress a copy, then test it beside the dense model."""
    request = _request(bench, cell)
    effort = request.resolved_effort
    tokens = tokens_of(
        bench.calibration, bench.loaded, effort.windows, effort.window_length, request.seed
    )
    model = copy.deepcopy(bench.loaded.model)
    layers = decoder_structure(model)
    ready, plan, plan_seconds = _planned(bench, request, model, layers, tokens)
    started = time.perf_counter()
    fit = request.resolved_method.fit
    done = compress_(ready, plan, dtype=torch.float32, fit=fit)
    seconds = time.perf_counter() - started
    note(f"{cell.method}: compressed in {seconds:.0f} s, now measuring")
    session = TorchSession(done.model, cell.method)
    quality = measure_quality(session, bench.reference, bench.tests.tokens.numpy(), note)
    interpolations = [group.get("largest_interpolation") for group in done.groups]
    return {
        "method": cell.method,
        "keep": cell.keep,
        "effort": cell.effort,
        "calibration": tokens.describe(),
        "kept_fraction": plan.kept_fraction,
        "decoder_linear_parameters": sum(group.kept_parameters for group in plan.groups),
        "parameters": parameter_count(done.model),
        **quality_fields(quality, np.array(dense["window_nlls"])),
        "questions": bench.question_scores(session) if _is_asked(cell) else None,
        "plan_seconds": round(plan_seconds, 1),
        "compress_seconds": round(seconds + plan_seconds, 1),
        "largest_interpolation": max((x for x in interpolations if x is not None), default=None),
    }


def _planned(
    bench: Bench, request: CompressRequest, model: Any, layers: list[Layer], tokens: TokenBatch
) -> tuple[CalibratedDecoder, RankPlan, float]:
    """What is measured, the plan, and the seconds of both; costs of the same effort are taken over.

    The seconds that a survey took are kept beside it and count for every row that uses it.
    """
    folder = bench.work / f"survey-{request.effort}"
    costs = LayerCosts(folder, {"text": tokens.describe()["sha256"]})
    ready = CalibratedDecoder.at_hand(model, layers, tokens, costs)
    clock = folder / "seconds"
    fresh = request.resolved_method.needs_costs and not clock.exists()
    started = time.perf_counter()
    plan = make_plan(request, ready)
    ready.measure(request)
    seconds = time.perf_counter() - started
    if fresh:
        clock.write_text(str(seconds))
    elif request.resolved_method.needs_costs:
        seconds += float(clock.read_text())
    return ready, plan, seconds


if __name__ == "__main__":
    sys.exit(run(command))
