"""Quality against bytes: ranks and bits searched together, plain quantisers, low rank in float16.

    python -m benchmarks.quality.pareto --test TEST.txt \
        --calibration VALID.txt

Bytes are those of the safetensors files that `skipcat compress` writes, embedding and head
included. Every row is fitted to the same FIT_WINDOWS calibration windows, and tested on the first
windows of the test text. Drawn beside are the low-rank methods of `quality.py` at the effort `fast`
in float16, which were fitted to four times as many. The JSON is written after every row; `--resume`
goes on from it.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from benchmarks import RESULTS
from benchmarks.command import run
from benchmarks.quality.evaluation_texts import hash_of_text, tokens_of
from benchmarks.quality.pareto_report import PLAIN, save_front, show_front
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
from pipeline.checkpoint.folder import save_checkpoint
from pipeline.compress.channel_scaling import scale_channels_
from pipeline.compress.decoder import CalibratedDecoder
from pipeline.compress.methods import ROTATIONS
from pipeline.compress.plan.layer_costs import LayerCosts
from pipeline.compress.plan.make_plan import make_plan
from pipeline.compress.request import CompressRequest
from pipeline.compress.rotation import rotate_
from pipeline.compress.walk import compress_
from pipeline.errors import PipelineError, UsageError
from pipeline.lazy import imported
from pipeline.model.structure import decoder_structure
from pipeline.progress import note
from pipeline.runtime.sessions.torch_session import TorchSession
from pipeline.workers.workers import Workers, open_workers
from validate.metrics import perplexity_with_error
from validate.quality import measure_quality

_RESULT = RESULTS / "pareto.json"
_BUDGETS = (0.25, 0.18, 0.32, 0.5, 0.14, 0.21, 0.1, 0.4, 0.75, 1.0)
# The bytes of the plain quantisers below.
_BUDGETS_OF_PLAIN = (0.2704, 0.207, 0.391, 0.5534, 0.3555)
EFFORT, MIX = "fast", 0.5
# Of the calibration windows, so many are fitted to; the survey has its own 16 of all of them.
_FIT_WINDOWS = 16
# Weights of the layers, and of the embedding and head, of each plain quantiser; about so many bits.
_FORMATS = {
    8: ("int8-b128-sym", "int8-b128-sym"),
    6: ("int6-b64-sym", "int6-b64-sym"),
    4: ("int4-b64-asym", "int4-b64-asym"),
    3: ("int3-b64-asym", "int3-b64-asym"),
    # 4 bits, a scale and an offset for every 32: as GGUF's Q4_1, which the model came in.
    5: ("int4-b32-offset", "int8-b64-sym"),
}


@dataclass(frozen=True)
class _Cell:
    """One row: a plain quantiser at some bits, or ours at a fraction of the float16 bytes.

    What is turned comes before anything else, then channels are scaled by the power `balance`.
    """

    method: str
    size: float
    balance: float = 0.0
    rotate: str = ROTATIONS[0]
    learn: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        """`gptq:4`, `ours:0.25`, `factors-int8:0.8`, `ours:0.25:0.5`, `gptq:3+values+learn`."""
        numbers = f"{self.size:g}" + (f":{self.balance:g}" if self.balance else "")
        rotate = "" if self.rotate == ROTATIONS[0] else f"+{self.rotate}"
        return f"{self.method}:{numbers}{rotate}" + ("+learn" if self.learn else "")

    @property
    def survey(self) -> str:
        """What is surveyed: the same of every budget."""
        rotate = "" if self.rotate == ROTATIONS[0] else f"-{self.rotate}"
        return f"survey-{self.method}" + (f"-{self.balance:g}" if self.balance else "") + rotate

    def request(self, model: str, calibration: str, seed: int) -> CompressRequest:
        """What `skipcat compress` is asked for."""
        shared: dict[str, Any] = {"calibration": calibration, "seed": seed, "effort": EFFORT}
        shared |= {"runtime": "any", "balance": self.balance}
        shared |= {"rotate": self.rotate, "learn_rounding": self.learn}
        if self.method == "ours":
            return CompressRequest(model, mix=MIX, keep_bytes=self.size, **shared)
        if self.method in ("factors", "factors-int8"):
            weights = "int8-b64-sym" if self.method == "factors-int8" else None
            return CompressRequest(model, self.size, method="skipcat", weights=weights, **shared)
        weights, table = _FORMATS[int(self.size)]
        return CompressRequest(
            model, 1.0, method=self.method, weights=weights, table=table, **shared
        )


def _all_cells() -> list[_Cell]:
    """Every row: ours and the quantisers in turn, so that an early end leaves a picture."""
    ours = [_Cell("ours", budget) for budget in _BUDGETS + _BUDGETS_OF_PLAIN]
    plain = [_Cell(method, bits) for bits in (4, 3, 8, 6, 5) for method in PLAIN]
    paper = [_Cell("factors", 0.8), _Cell("factors-int8", 0.8)]
    return ours[:4] + plain[:4] + paper + ours[4:] + plain[4:]


@click.command()
@click.option("--test", type=click.Path(path_type=Path), required=True, help="Test text, UTF-8.")
@click.option("--calibration", required=True, help="Calibration text.")
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--only", default="", help="Rows, such as ours:0.25,gptq:4.")
@click.option("--work", type=click.Path(path_type=Path), help="Keep the survey and logits here.")
@click.option("--test-windows", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "result", type=click.Path(path_type=Path), default=_RESULT)
@click.option("--resume", is_flag=True, help="Keep the rows that the JSON has already.")
@by_workers
def command(
    test: Path,
    calibration: str,
    model: str,
    only: str,
    work: Path | None,
    test_windows: int,
    seed: int,
    result: Path,
    resume: bool,
    workers: str | None,
) -> None:
    """Measure perplexity against bytes for ours and for every plain quantiser."""
    settings = Settings(
        model=model,
        test=test.name,
        test_sha256=hash_of_text(test),
        test_windows=test_windows,
        test_window_length=2048,
        calibration=Path(calibration).name,
        calibration_sha256=hash_of_text(Path(calibration)),
        questions=None,
        limit=None,
        seed=seed,
    )
    refuse_test_text(settings)
    require_shared_work(work, workers)
    table = open_table(settings, result, resume=resume)
    cells = [_parsed(text) for text in only.split(",")] if only else _all_cells()
    with tempfile.TemporaryDirectory() as scratch, open_workers(workers) as own:
        opening = Opening.of(settings, test, calibration, None, work or Path(scratch))
        _measure(opening, cells, table, result, own)
    table["low_rank"] = _low_rank_rows(settings)
    write_json(result, table)
    show_front(table)
    save_front(table, result.with_suffix(".svg"))


def _parsed(text: str) -> _Cell:
    """A row from "method:size".

    Raises:
        UsageError: it is none.
    """
    plain, *words = text.split("+")
    method, *numbers = plain.split(":")
    cells = {cell.name: cell for cell in _all_cells()}
    beside: dict[str, tuple[str, Any]] = {
        word: ("learn", True) if word == "learn" else ("rotate", word) for word in words
    }
    try:
        size, balance = map(float, [*numbers, "0"][: max(2, len(numbers))])
        cell = cells.get(text) or _Cell(method, size, balance, **dict(beside.values()))
        cell.request("", "", 0).check()
        return cell
    except (ValueError, TypeError, KeyError, PipelineError) as error:
        expected = f"{', '.join(cells)}; with +values or +all turned, with +learn learned"
        raise UsageError(
            "This is not a row.", where="--only", observed=text, expected=expected
        ) from error


def _measure(
    opening: Opening, cells: list[_Cell], table: dict[str, Any], result: Path, workers: Workers
) -> None:
    """Measure every row that `table` lacks, and write it as it is finished."""
    finished = {row["name"] for row in table["rows"]}
    if "dense" not in finished:
        _add(table, result, _dense_row(opening.open()))
    dense = next(row for row in table["rows"] if row["name"] == "dense")
    missing = [(cell, cell.survey) for cell in cells if cell.name not in finished]
    rows_in_order(workers, opening, _measured_row, dense, missing, partial(_add, table, result))
    table["computed_by"] = workers.describe()


def _add(table: dict[str, Any], result: Path, row: dict[str, Any]) -> None:
    """Put a row into the table and onto the disk."""
    table["rows"].append(row)
    result.parent.mkdir(parents=True, exist_ok=True)
    write_json(result, table)
    note(f"{row['name']}: {row['stored_bytes'] / 1e6:.2f} MB, perplexity {row['perplexity']:.2f}")


def _dense_row(bench: Bench) -> dict[str, Any]:
    """The model as it is, in float16."""
    quality = measure_quality(bench.reference, None, bench.tests.tokens.numpy(), note)
    numbers = sum(parameter.numel() for parameter in bench.loaded.model.parameters())
    return {"name": "dense", "stored_bytes": 2 * numbers, **quality_fields(quality, None)}


def _measured_row(bench: Bench, cell: _Cell, dense: dict[str, Any]) -> dict[str, Any]:
    """Compress a copy as the row asks, write it, and test it beside the dense model."""
    request = cell.request(bench.settings.model, bench.calibration, bench.settings.seed)
    request.check()
    effort = request.resolved_effort
    tokens = tokens_of(
        bench.calibration, bench.loaded, effort.windows, effort.window_length, request.seed
    )
    model = copy.deepcopy(bench.loaded.model)
    layers = decoder_structure(model)
    formats = [style.name for style in request.formats]
    costs = LayerCosts(
        bench.work / cell.survey, {"text": tokens.describe()["sha256"], "formats": formats}
    )
    started, cpu_started = time.perf_counter(), time.process_time()
    added = 0
    if request.rotates:
        added = rotate_(model, layers, cell.rotate, request.seed).added_parameters
    if cell.balance:
        scale_channels_(model, layers, tokens.tokens, cell.balance)
    plan = make_plan(request, CalibratedDecoder.at_hand(model, layers, tokens, costs, added))
    plan_seconds, plan_cpu = time.perf_counter() - started, time.process_time() - cpu_started
    fit = request.resolved_method.fit
    dtype = torch.float32 if cell.method == "factors" else torch.float16
    fitted = replace(tokens, tokens=tokens.spread(_FIT_WINDOWS))
    ready = CalibratedDecoder.at_hand(model, layers, fitted, costs)
    ready.measure(request)
    done = compress_(ready, plan, dtype=dtype, fit=fit)
    entries = ready.quantize_embeddings_(plan.embeddings, imported(fit.quantize))
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    with tempfile.TemporaryDirectory() as folder:
        modules = done.modules | entries
        save_checkpoint(model, bench.loaded.tokenizer, modules, Path(folder), torch.float16)
        stored_bytes = sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))
    note(f"{cell.name}: {stored_bytes / 1e6:.2f} MB after {seconds:.0f} s, now measuring")
    quality = measure_quality(
        TorchSession(model, cell.name), bench.reference, bench.tests.tokens.numpy(), note
    )
    numbers = sum(parameter.numel() for parameter in bench.loaded.model.parameters())
    return {
        "name": cell.name,
        "method": cell.method,
        "stored_bytes": stored_bytes,
        "budget_bytes": request.budget_bytes(2 * numbers) if request.searches_bits else None,
        "kept_fraction": plan.kept_fraction,
        "expected_kl": sum(group.expected_kl or 0.0 for group in plan.groups),
        "forms": _forms_of(plan),
        "tables": plan.embeddings,
        **quality_fields(quality, np.array(dense["window_nlls"])),
        "plan_seconds": round(plan_seconds, 1),
        "plan_cpu_seconds": round(plan_cpu, 1),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
    }


def _forms_of(plan: Any) -> dict[str, int]:
    """How many groups there are of each form and pair of formats."""
    counts: dict[str, int] = {}
    for group in plan.groups:
        name = " ".join(filter(None, (group.form, group.down_format, group.up_format)))
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _low_rank_rows(settings: Settings) -> list[dict[str, Any]]:
    """The low-rank methods of quality.json, on the same windows; float16, embedding included."""
    path = _RESULT.with_name("quality.json")
    if not path.is_file():
        return []
    table = json.loads(path.read_text(encoding="utf-8"))
    same = ("model", "test_sha256", "calibration_sha256", "test_window_length", "seed")
    if any(table["settings"][key] != getattr(settings, key) for key in same):
        return []
    rows = []
    for row in table["rows"]:
        if row["effort"] == EFFORT:
            nlls = np.array(row["window_nlls"][: settings.test_windows])
            perplexity, error = perplexity_with_error(nlls)
            rows.append(
                {
                    "name": f"{row['method']}:{row['keep']:g}",
                    "method": row["method"],
                    "stored_bytes": 2 * row["parameters"],
                    "perplexity": perplexity,
                    "perplexity_standard_error": error,
                }
            )
    return rows


if __name__ == "__main__":
    sys.exit(run(command))
