"""One budget for weights and cache, against five splits of it that are chosen by hand.

    python -m benchmarks.quality.cache_budget --calibration CALIBRATION.txt --test TEST.txt

`skipcat compress --memory M --context N` searches ranks and bits of both together. Beside it M is
divided by hand, a share of it for the cache (`--cache-bytes`), the rest for the weights. All are
fitted to the same text, and measured on another: whole windows, against what is cached of them. Run
again, it goes on behind the rows that the JSON has.
"""

from __future__ import annotations

import copy
import gc
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table

from benchmarks import RESULTS
from benchmarks.command import run
from benchmarks.finished_rows import finished_rows
from benchmarks.quality.evaluation_texts import hash_of_text, require_another_text, tokens_of
from benchmarks.quality.whole_windows import WholeWindows
from pipeline.artefact import write_json
from pipeline.bench.measure import describe_machine, load_average
from pipeline.calibrate.text import TokenBatch
from pipeline.compress.decoder import CalibratedDecoder
from pipeline.compress.plan.layer_costs import LayerCosts
from pipeline.compress.plan.make_plan import make_plan
from pipeline.compress.request import CompressRequest
from pipeline.compress.walk import compress_
from pipeline.lazy import imported
from pipeline.memory import parse_bytes
from pipeline.model.load import LoadedModel, load_model
from pipeline.model.structure import decoder_structure
from pipeline.progress import note, result_console
from pipeline.provenance import provenance

_RESULT = RESULTS / "cache_budget.json"
_TOGETHER = "one budget"
_SHARES = (0.1, 0.15, 0.2, 0.3, 0.4)
_WINDOW_LENGTH = 2048
_IDENTITY = (
    "model", "memory", "context", "calibration_sha256", "test_sha256", "test_tokens", "effort"
)  # fmt: skip


@click.command()
@click.option("--calibration", required=True, help="Calibration text.")
@click.option("--test", required=True, help="Text that nothing was calibrated on.")
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--memory", default="100MB", show_default=True, help="Of weights and cache.")
@click.option("--context", type=int, default=4096, show_default=True)
@click.option("--windows", type=int, default=4, show_default=True, help="Of 2,048 tokens.")
@click.option("--effort", default="fast", show_default=True)
@click.option("--calibration-windows", type=int, help="By default the effort's.")
@click.option("--calibration-length", type=int, help="Tokens in each; by default the effort's.")
@click.option("--work", type=click.Path(path_type=Path), help="Keep the survey here.")
@click.option("--json", "result", type=click.Path(path_type=Path), default=_RESULT)
def command(
    calibration: str,
    test: str,
    model: str,
    memory: str,
    context: int,
    windows: int,
    effort: str,
    calibration_windows: int | None,
    calibration_length: int | None,
    work: Path | None,
    result: Path,
) -> None:
    """Measure the search and the five splits; a row each, and the JSON after each."""
    require_another_text(calibration, test)
    read = {
        "calibration": calibration,
        "effort": effort,
        "windows": calibration_windows,
        "window_length": calibration_length,
    }
    requests = _requests(model, read, parse_bytes(memory, "--memory"), context)
    loaded = load_model(model, dtype=torch.float32)
    tests = tokens_of(test, loaded, windows, _WINDOW_LENGTH, 0, sequential=True).tokens
    record: dict[str, Any] = {
        "schema": 1,
        "model": model,
        "memory": memory,
        "context": context,
        "effort": effort,
        "calibration_sha256": hash_of_text(Path(calibration)),
        "test_sha256": hash_of_text(Path(test)),
        "test_tokens": tests.numel(),
        "machine": describe_machine(),
        "provenance": provenance(),
        "rows": [],
    }
    record["rows"] = finished_rows(result, record, _IDENTITY)
    there = {row["name"] for row in record["rows"]}
    whole = WholeWindows(tests, _logits_of(loaded.model))
    with tempfile.TemporaryDirectory() as scratch:
        for name, request in requests.items():
            if name in there:
                continue
            row = _row(loaded, request, work or Path(scratch), whole)
            record["rows"].append({"name": name} | row)
            write_json(result, record)
            note(f"{name}: {row}")
            gc.collect()  # a model is a web of cycles
    _show(record)


def _requests(
    model: str, read: dict[str, Any], whole_bytes: int, context: int
) -> dict[str, CompressRequest]:
    """Of the search, and of every split."""
    shared = {**read, "runtime": "any"}
    found = {_TOGETHER: CompressRequest(model, memory=str(whole_bytes), context=context, **shared)}
    for share in _SHARES:
        weights, token = int((1 - share) * whole_bytes), int(share * whole_bytes / context)
        found[f"{share:.0%} for the cache"] = CompressRequest(
            model, memory=str(weights), cache_bytes=str(token), **shared
        )
    for request in found.values():
        request.check()
    return found


def _row(
    loaded: LoadedModel,
    request: CompressRequest,
    work: Path,
    windows: WholeWindows,
) -> dict[str, Any]:
    """Compress a copy as the request asks, and measure it."""
    started, loads = time.perf_counter(), [load_average()]
    effort = request.resolved_effort
    tokens = tokens_of(
        request.calibration, loaded, effort.windows, effort.window_length, request.seed
    )
    model, plan, cache_bytes = _compressed(loaded, request, tokens, work)
    perplexity, kl = windows.measure(_logits_of(model))
    return {
        "memory_bytes": parse_bytes(str(request.memory), "--memory"),
        "cache_bytes_a_token": cache_bytes,
        "expected_kl_of_weights": sum(group.expected_kl or 0.0 for group in plan.groups),
        "perplexity": perplexity,
        "kl": kl,
        "seconds": round(time.perf_counter() - started, 1),
        "load_average": [*loads, load_average()],
    }


def _compressed(
    loaded: LoadedModel, request: CompressRequest, tokens: TokenBatch, work: Path
) -> tuple[Any, Any, int]:
    """The model, its plan, and the bytes that a token takes in its cache."""
    model = copy.deepcopy(loaded.model)
    layers = decoder_structure(model)
    costs = LayerCosts(work / "survey", {"text": tokens.describe()["sha256"]})
    ready = CalibratedDecoder.at_hand(model, layers, tokens, costs)
    plan = make_plan(request, ready)
    fit = request.resolved_method.fit
    compress_(ready, plan, dtype=torch.float32, fit=fit)
    ready.quantize_embeddings_(plan.embeddings, imported(fit.quantize))
    with tempfile.TemporaryDirectory() as folder:  # of this model's own statistics
        cache = ready.shrink_cache_(request, plan.caches, Path(folder), {"seed": request.seed})
    return model, plan, cache.token_bytes


def _logits_of(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Of windows [1, T], without a cache."""

    def logits_of(window: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=window, use_cache=False).logits
        return logits

    return logits_of


def _show(record: dict[str, Any]) -> None:
    table = Table("split", "weights, MB", "cache, bytes a token", "perplexity", "KL")
    for row in record["rows"]:
        cells = (row["memory_bytes"] / 1e6, row["cache_bytes_a_token"])
        table.add_row(
            row["name"],
            f"{cells[0]:.1f}" + (" with the cache" if row["name"] == _TOGETHER else ""),
            f"{cells[1]:,}",
            f"{row['perplexity']:.3f}",
            f"{row['kl']:.4f}",
        )
    result_console().print(table)


if __name__ == "__main__":
    sys.exit(run(command))
