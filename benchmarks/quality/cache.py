"""What smaller KV caches cost: perplexity and KL against the bytes of a token.

    python -m benchmarks.quality.cache --calibration CALIBRATION.txt --test TEST.txt --work WORK
    python -m benchmarks.quality.cache ... --test arc_easy_test.jsonl --json cache_second.json

The weights stay as they are. Every cached number is cut or rounded, none is kept exact, and whole
windows are read in one call, against what is cached of them. Bits are of a cached number, scales
and offsets included. Run again, it goes on behind the rows that the JSON has. A test text of
questions (`.jsonl`, with `question`, `choices` and `answer`) is read as these with their answers.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from transformers import DynamicCache

from benchmarks import RESULTS
from benchmarks.command import run
from benchmarks.finished_rows import finished_rows
from benchmarks.quality.cache_report import save_fronts, show_rows
from benchmarks.quality.evaluation_texts import hash_of_text, require_another_text, tokens_of
from benchmarks.quality.whole_windows import WholeWindows
from benchmarks.rivals.cache_formats import FORMATS, CacheFormat, ChangedCache
from benchmarks.rivals.pruned_pairs import KeptNumbers
from pipeline.artefact import write_json
from pipeline.bench.measure import describe_machine, load_average
from pipeline.checkpoint.modeling_cache import remove_cache_maps
from pipeline.compress.cache.cache_plan import CachePlan
from pipeline.compress.cache.compress_cache import CacheText, compress_cache_
from pipeline.compress.cache.statistics import measure_cache
from pipeline.compress.request import CompressRequest
from pipeline.errors import UsageError
from pipeline.export.rounded_cache import empty_cache, rounding_of
from pipeline.model.cache_structure import cache_structure
from pipeline.model.load import LoadedModel, load_model
from pipeline.model.structure import decoder_structure
from pipeline.progress import note
from pipeline.provenance import provenance

_RESULT = RESULTS / "cache.json"
_WINDOW_LENGTH, _CALIBRATION_LENGTH = 2048, 512
_OURS = "skipcat-kl"
_STATISTICS = {"seed": 0}
_BITS, _NARROW_BITS = (8.0, 6.0, 4.25, 3.5, 3.0, 2.25), (8.0, 6.0, 4.5, 3.5, 3.0)
_PLAIN_BITS = (4.25, 3.0, 2.25)
_IDENTITY = ("model", "calibration_sha256", "calibration_tokens", "test_sha256", "test_tokens")


@dataclass(frozen=True)
class _Row:
    """A cache to be measured.

    Attributes:
        name: for the table.
        family: rows of one line in the chart.
        settings: of a request that makes it; empty for a rival's format.
        chosen: a rival's format, or None.
        rebuilds: keys are rebuilt at every step, which stock kernels cannot.
        static: ONNX Runtime's own cache of codes, in scales that do not change.
        pruned: share of RoPE pairs, and of the numbers of values, that RAP leaves out.
        plain: the searched plan with each number rounded by itself.
    """

    name: str
    family: str
    settings: dict[str, Any]
    chosen: CacheFormat | None = None
    rebuilds: bool = False
    static: bool = False
    pruned: float = 0.0
    plain: bool = False


def _rows() -> list[_Row]:
    """The rivals and ours in turn, so that an early end leaves a picture."""
    formats = [_Row(name, name.split(" ")[0].split("-")[0], {}, f) for name, f in FORMATS.items()]
    static = _Row("int8, static scales (ONNX Runtime)", "int8, static", {}, static=True)
    searched = [
        _made(f"ranks and bits, {bits:g}", "ours, rebuilt", {"keep_cache": bits / 16})
        for bits in _BITS
    ]
    plain = [
        replace(row, name=f"{row.name}, rounded plainly", family="ours, no feedback", plain=True)
        for row in searched
        if row.settings["keep_cache"] * 16 in _PLAIN_BITS
    ]
    narrow = [
        _made(f"narrow, {b:g}", "ours, narrow", {"keep_cache": b / 16, "cache_form": "narrow"})
        for b in _NARROW_BITS
    ]
    pruned = [
        _Row(f"RAP, {removed:.1%} of pairs removed", "RAP", {}, pruned=removed)
        for removed in (0.125, 0.25, 0.5)
    ]
    made = [*_ranks_alone(), *_palus_in_few_bits()]
    return [*searched, *plain, *narrow, *formats, static, *pruned, *made]


def _ranks_alone() -> list[_Row]:
    found = []
    for removed in (0.5, 0.7):
        budget: dict[str, Any] = {"keep_cache": 1 - removed, "cache_bits": "float"}
        for method, family in (
            (_OURS, "ours, ranks alone"), ("palu", "Palu"), ("palu-uniform", "Palu, uniform"),
        ):  # fmt: skip
            name = f"{method}, ranks alone, {removed:.0%} removed"
            found.append(_made(name, family, budget | {"method": method}))
    by_head = {"keep_cache": 0.5, "cache_bits": "float", "cache_groups": 0}
    found.append(_made("by head, ranks alone, 50% removed", "ours, by head", by_head))
    for removed in (0.125, 0.25, 0.375):
        for form, bits in (("narrow", "float"), ("stock", "any")):
            wanted = {"keep_cache": 1 - removed, "cache_bits": bits, "cache_form": form}
            name = f"{form}, ranks alone, {removed:.1%} removed"
            found.append(_made(name, f"ours, {form}, ranks alone", wanted))
    return found


def _palus_in_few_bits() -> list[_Row]:
    """Palu at half its ranks and at 70% of them, with latents of 4 and of 3 bits."""
    return [
        _made(
            f"palu, {kept:.0%} of ranks in {bits} bits",
            f"Palu, {bits} bits",
            {"keep_cache": kept * bits / 16, "cache_bits": str(bits), "method": "palu"},
        )
        for bits in (4, 3)
        for kept in (0.7, 0.5)
    ]


def _made(name: str, family: str, settings: dict[str, Any]) -> _Row:
    own = {"method": _OURS} | settings
    return _Row(name, family, own, rebuilds=settings.get("cache_form") is None)


@click.command()
@click.option("--calibration", required=True, help="Calibration text.")
@click.option("--test", required=True, help="Text that nothing was calibrated on.")
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--windows", type=int, default=4, show_default=True, help="Of 2,048 tokens.")
@click.option("--calibration-windows", type=int, default=32, show_default=True)
@click.option("--only", default="", help="Rows whose names have this in them.")
@click.option("--work", type=click.Path(path_type=Path), help="Keep what is measured here.")
@click.option("--json", "result", type=click.Path(path_type=Path), default=_RESULT)
def command(
    calibration: str,
    test: str,
    model: str,
    windows: int,
    calibration_windows: int,
    only: str,
    work: Path | None,
    result: Path,
) -> None:
    """Measure every cache; print a row each and write the JSON after each, then two charts."""
    rows = [row for row in _rows() if only in row.name]
    if not rows:
        names = ", ".join(row.name for row in _rows())
        raise UsageError("There is no such row.", where="--only", observed=only, expected=names)
    require_another_text(calibration, test)
    loaded = load_model(model, dtype=torch.float32)
    read = tokens_of(calibration, loaded, calibration_windows, _CALIBRATION_LENGTH, 0)
    with tempfile.TemporaryDirectory() as scratch:
        text = _as_text(Path(test), Path(scratch))
        tests = tokens_of(str(text), loaded, windows, _WINDOW_LENGTH, 0, sequential=True).tokens
        record: dict[str, Any] = {
            "schema": 2,
            "model": model,
            "calibration_sha256": hash_of_text(Path(calibration)),
            "calibration_tokens": read.tokens.numel(),
            "test": Path(test).name,
            "test_sha256": hash_of_text(Path(test)),
            "test_tokens": tests.numel(),
            "machine": describe_machine(),
            "provenance": provenance(),
            "rows": [],
        }
        record["rows"] = finished_rows(result, record, _IDENTITY)
        bench = _Bench(loaded, read.tokens, tests)
        record["dense"] = {"perplexity": bench.windows.perplexity}
        _measure(bench, rows, record, result, work or Path(scratch))
    show_rows(record)
    save_fronts(record, result)


def _as_text(path: Path, scratch: Path) -> Path:
    """A text as it is; questions as one text of them and their answers."""
    if path.suffix != ".jsonl":
        return path
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        lines.append(f"{item['question']} {item['choices'][item['answer']]}")
    written = scratch / "questions.txt"
    written.write_text("\n".join(lines), encoding="utf-8")
    return written


def _measure(
    bench: _Bench, rows: list[_Row], record: dict[str, Any], result: Path, work: Path
) -> None:
    """Measure what the record lacks, and write it as it is finished."""
    there = {row["cache"] for row in record["rows"]}
    for row in (row for row in rows if row.name not in there):
        started, loads = time.perf_counter(), [load_average()]
        found = bench.measured(row, work)
        found |= {"seconds": round(time.perf_counter() - started, 1)}
        record["rows"].append(found | {"load_average": [*loads, load_average()]})
        note(str(found))
        write_json(result, record)


class _Bench:
    """A model, its texts, and what it says without any change."""

    def __init__(self, loaded: LoadedModel, calibration: torch.Tensor, tests: torch.Tensor) -> None:
        self.model, self.calibration = loaded.model, calibration
        self.layers = decoder_structure(loaded.model)
        self.windows = WholeWindows(
            tests, lambda window: self._logits(window, DynamicCache(config=self.model.config))
        )

    def measured(self, row: _Row, folder: Path) -> dict[str, Any]:
        """Bits, perplexity and KL of one cache."""
        own = {"cache": row.name, "family": row.family, "rebuilds": row.rebuilds}
        config = self.model.config
        if row.chosen is not None:
            chosen = row.chosen
            return own | _entry(chosen.bits, self._run(lambda: ChangedCache(config, chosen.of)))
        if row.static:
            rounding = rounding_of(self.model, self.calibration, _WINDOW_LENGTH)
            return own | _entry(8.0, self._run(lambda: empty_cache(config, rounding)))
        if row.pruned:
            kept = self._kept_numbers(row.pruned, folder)
            bits = 8 * (kept.keys[0].mean().item() + kept.values[0].mean().item())
            return own | _entry(bits, self._run(lambda: ChangedCache(config, kept.of_layer)))
        settings = dict(row.settings)
        if settings.get("cache_groups") == 0:
            settings["cache_groups"] = config.num_key_value_heads
        request = CompressRequest("unused", keep_params=1.0, **settings)
        request.check()
        plan = self._cached(request, None, folder)
        if row.plain:
            remove_cache_maps(self.model)
            plan = self._cached(request, _without_feedback(plan), folder)
        try:
            found = self._run(lambda: DynamicCache(config=config))
        finally:
            remove_cache_maps(self.model)
        return (
            own
            | _entry(16 * plan.kept_fraction, found)
            | {
                "token_bytes": plan.token_bytes,
                "expected_kl": plan.expected_kl or None,
            }
        )

    def _cached(self, request: CompressRequest, planned: Any, folder: Path) -> CachePlan:
        """The plan, whose maps are then in the model."""
        text = CacheText(self.calibration, self.calibration)
        return compress_cache_(self.model, self.layers, text, request, planned, folder, _STATISTICS)

    def _kept_numbers(self, removed: float, folder: Path) -> KeptNumbers:
        structure = cache_structure(self.model, self.layers)
        seen = measure_cache(
            self.model, self.layers, structure, self.calibration, folder, _STATISTICS
        )
        return KeptNumbers.of(structure, seen, removed)

    def _run(self, make: Callable[[], DynamicCache]) -> tuple[float, float]:
        """Perplexity, and mean KL to the original, of the model over a cache."""
        return self.windows.measure(lambda window: self._logits(window, make()))

    def _logits(self, window: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=window, past_key_values=cache).logits
        return logits


def _without_feedback(plan: CachePlan) -> dict[str, Any]:
    """The section of a plan that is edited so."""
    own = plan.to_json()
    own["sides"] = [side | {"error_feedback": False} for side in own["sides"]]
    return own


def _entry(bits: float, found: tuple[float, float]) -> dict[str, Any]:
    perplexity, kl = found
    return {"bits": bits, "perplexity": perplexity, "kl": kl}


if __name__ == "__main__":
    sys.exit(run(command))
