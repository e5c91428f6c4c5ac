"""What each side of a planned cache was expected to cost, against what it costs alone.

    python -m benchmarks.quality.planned_cache --calibration CALIBRATION.txt --test TEST.txt

A cache is planned as `skipcat compress --keep-cache` plans it, at several budgets. Then the keys of
every layer, and the values, are cached as planned while all else is as it was, and the KL to the
original is measured on a text that nothing was planned on. The figures are the rank correlation of
the two costs over all sides, and the median of measured over expected.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from scipy.stats import spearmanr
from transformers import DynamicCache

from benchmarks import RESULTS
from benchmarks.command import run
from benchmarks.quality.evaluation_texts import hash_of_text, require_another_text, tokens_of
from benchmarks.quality.whole_windows import WholeWindows
from pipeline.artefact import write_json
from pipeline.bench.measure import describe_machine
from pipeline.checkpoint.modeling_cache import cache_maps, remove_cache_maps
from pipeline.compress.cache.cache_plan import CachePlan
from pipeline.compress.cache.compress_cache import CacheText, compress_cache_
from pipeline.compress.request import CompressRequest
from pipeline.model.load import load_model
from pipeline.model.structure import decoder_structure
from pipeline.progress import note, track
from pipeline.provenance import provenance

_RESULT = RESULTS / "planned_cache.json"
_BITS = (4.25, 3.0)
_WINDOW_LENGTH = 512


@click.command()
@click.option("--calibration", required=True, help="Calibration text.")
@click.option("--test", required=True, help="Text that nothing was calibrated on.")
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--windows", type=int, default=4, show_default=True, help="Of 512 tokens.")
@click.option("--calibration-windows", type=int, default=32, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), help="Keep what is measured here.")
@click.option("--json", "result", type=click.Path(path_type=Path), default=_RESULT)
def command(
    calibration: str,
    test: str,
    model: str,
    windows: int,
    calibration_windows: int,
    work: Path | None,
    result: Path,
) -> None:
    """Correlate expected and measured KL over the keys and values of all layers."""
    require_another_text(calibration, test)
    loaded = load_model(model, dtype=torch.float32)
    length = min(_WINDOW_LENGTH, loaded.model.config.max_position_embeddings)
    read = tokens_of(calibration, loaded, calibration_windows, length, 0)
    tests = tokens_of(test, loaded, windows, length, 0, sequential=True).tokens
    rows: list[dict[str, Any]] = []
    logits = _logits_of(loaded.model)
    original = WholeWindows(tests, logits)
    with tempfile.TemporaryDirectory() as scratch:
        for bits in _BITS:
            plan = _installed(loaded.model, read.tokens, bits, work or Path(scratch))
            rows += _costs(loaded.model, plan, bits, lambda: original.measure(logits)[1])
    record = {
        "schema": 1,
        "model": model,
        "calibration_sha256": hash_of_text(Path(calibration)),
        "test_sha256": hash_of_text(Path(test)),
        "test_tokens": tests.numel(),
        "machine": describe_machine(),
        "provenance": provenance(),
        "agreement": {f"{bits:g}": _agreement(rows, bits) for bits in _BITS},
        "rows": rows,
    }
    write_json(result, record)
    click.echo(json.dumps(record["agreement"], indent=2))


def _logits_of(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Of windows [1, T], against what is cached of them."""

    def logits_of(window: torch.Tensor) -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        logits: torch.Tensor = model(input_ids=window, past_key_values=cache).logits
        return logits

    return logits_of


def _installed(model: Any, read: torch.Tensor, bits: float, folder: Path) -> CachePlan:
    """The plan of so many bits, whose maps are then in the model."""
    request = CompressRequest("unused", keep_params=1.0, keep_cache=bits / 16)
    request.check()
    layers = decoder_structure(model)
    text = CacheText(read, read)
    return compress_cache_(model, layers, text, request, None, folder, {"seed": 0})


def _costs(
    model: Any, plan: CachePlan, bits: float, measured_kl: Callable[[], float]
) -> list[dict[str, Any]]:
    """Expected and measured KL of every side that is cached as latents; takes the maps out."""
    rows = []
    try:
        maps = cache_maps(model)
        planned = {f"{s.source.rpartition('.')[0]}.{s.side}_map": s for s in plan.sides}
        for name, own in track(list(maps.items()), f"sides at {bits:g} bits"):
            for other in maps.values():
                other.is_active = other is own
            side = planned[name]
            found = {"source": side.source, "side": side.side, "rank": side.rank, "bits": side.bits}
            expected = {"budget": bits, "expected_kl": side.expected_kl}
            rows.append(found | expected | {"measured_kl": measured_kl()})
            note(str(rows[-1]))
    finally:
        remove_cache_maps(model)
    return rows


def _agreement(rows: list[dict[str, Any]], bits: float) -> dict[str, float]:
    """Rank correlation, and the median and the tenths of measured over expected."""
    own = [row for row in rows if row["budget"] == bits]
    expected, measured = (
        np.array([row[f"{k}_kl"] for row in own]) for k in ("expected", "measured")
    )
    ratios = measured / expected
    return {
        "sides": len(own),
        "rank_correlation": float(spearmanr(expected, measured).statistic),
        "median_ratio": float(np.median(ratios)),
        "tenth_ratio": float(np.quantile(ratios, 0.1)),
        "ninetieth_ratio": float(np.quantile(ratios, 0.9)),
    }


if __name__ == "__main__":
    sys.exit(run(command))
