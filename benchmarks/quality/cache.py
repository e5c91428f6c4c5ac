"""What smaller KV caches cost: perplexity and KL against the bytes of a token.

    python -m benchmarks.quality.cache --calibration CALIBRATION.txt --test TEST.txt

The weights stay as they are. Every cached number is cut or rounded, none is kept exact, and whole
windows are read in one call, against what is cached of them. Bits are of a cached number, scales
and offsets included.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from transformers import DynamicCache

from benchmarks import RESULTS
from benchmarks.command import run
from benchmarks.quality.evaluation_texts import hash_of_text, tokens_of
from benchmarks.rivals.cache_formats import FORMATS, CacheFormat, RoundingCache
from pipeline.artefact import write_json
from pipeline.bench.measure import describe_machine, load_average
from pipeline.checkpoint.modeling_cache import remove_cache_maps
from pipeline.compress.cache.compress_cache import compress_cache_
from pipeline.compress.request import CompressRequest
from pipeline.model.load import LoadedModel, load_model
from pipeline.model.structure import decoder_structure
from pipeline.progress import note
from pipeline.provenance import provenance

_RESULT = RESULTS / "cache.json"
_WINDOW_LENGTH, _CALIBRATION_LENGTH = 2048, 512
_KL_STEP = 8  # on every so many tokens: logits of all would fill memory
_OURS = "skipcat-kl"


@dataclass(frozen=True)
class _Row:
    """A cache to be measured.

    Attributes:
        name: for the table.
        settings: of a request that makes it; empty for a rival's format.
        chosen: a rival's format.
    """

    name: str
    settings: dict[str, Any]
    chosen: CacheFormat | None = None


def _rows() -> list[_Row]:
    half = {"keep_cache": 0.5, "cache_bits": "float"}
    less = {"keep_cache": 0.3, "cache_bits": "float"}
    found = [_Row(name, {}, chosen) for name, chosen in FORMATS.items()]
    for name, budget in (("50% removed", half), ("70% removed", less)):
        for method in ("palu", "palu-uniform", _OURS):
            found.append(_Row(f"{method}, ranks alone, {name}", budget | {"method": method}))
    found.append(_Row("skipcat-kl, by head, ranks alone, 50% removed", half | {"cache_groups": 3}))
    for bits in (4.25, 3.0, 2.25):
        found.append(_Row(f"skipcat-kl, ranks and bits, {bits}", {"keep_cache": bits / 16}))
    return found


@click.command()
@click.option("--calibration", required=True, help="Calibration text.")
@click.option("--test", required=True, help="Text that nothing was calibrated on.")
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--windows", type=int, default=4, show_default=True, help="Of 2,048 tokens.")
@click.option("--calibration-windows", type=int, default=32, show_default=True)
@click.option("--json", "result", type=click.Path(path_type=Path), default=_RESULT)
def command(
    calibration: str, test: str, model: str, windows: int, calibration_windows: int, result: Path
) -> None:
    """Measure every cache; print a row each and write the JSON after each."""
    loaded = load_model(model, dtype=torch.float32)
    read = tokens_of(calibration, loaded, calibration_windows, _CALIBRATION_LENGTH, 0)
    tests = tokens_of(test, loaded, windows, _WINDOW_LENGTH, 0, sequential=True).tokens
    bench = _Bench(loaded, read.tokens, tests)
    record: dict[str, Any] = {
        "schema": 1,
        "model": model,
        "calibration_sha256": hash_of_text(Path(calibration)),
        "calibration_tokens": read.tokens.numel(),
        "test_sha256": hash_of_text(Path(test)),
        "test_tokens": tests.numel(),
        "machine": describe_machine(),
        "load_average": load_average(),
        "provenance": provenance(),
        "dense": bench.dense(),
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for row in _rows():
            record["rows"].append(bench.measured(row, Path(folder)))
            note(str(record["rows"][-1]))
            write_json(result, record)


class _Bench:
    """A model, its texts, and what it says without any change."""

    def __init__(self, loaded: LoadedModel, calibration: torch.Tensor, tests: torch.Tensor) -> None:
        self.model, self.calibration, self.tests = loaded.model, calibration, tests
        self.layers = decoder_structure(loaded.model)
        self.original: list[torch.Tensor] = []

    def dense(self) -> dict[str, Any]:
        """Perplexity of the model as it is."""
        return {"perplexity": self._run(lambda: DynamicCache(config=self.model.config))[0]}

    def measured(self, row: _Row, folder: Path) -> dict[str, Any]:
        """Bits, perplexity and KL of one cache."""
        if row.chosen is not None:
            chosen = row.chosen
            found = self._run(lambda: RoundingCache(self.model.config, chosen))
            return _entry(row.name, chosen.bits, *found)
        request = CompressRequest("unused", keep_params=1.0, **row.settings)
        request.check()
        plan = compress_cache_(
            self.model, self.layers, self.calibration, request, None, folder, {"seed": 0}
        )
        try:
            found = self._run(lambda: DynamicCache(config=self.model.config))
        finally:
            remove_cache_maps(self.model)
        return _entry(row.name, 16 * plan.kept_fraction, *found) | {
            "token_bytes": plan.token_bytes,
            "expected_kl": sum(side.expected_kl or 0.0 for side in plan.sides) or None,
        }

    @torch.no_grad()
    def _run(self, make: Callable[[], DynamicCache]) -> tuple[float, float]:
        """Perplexity, and mean KL to the original on every eighth token."""
        losses, divergences = [], []
        for number, window in enumerate(self.tests):
            logits = self.model(input_ids=window[None], past_key_values=make()).logits[0].float()
            losses.append(float(torch.nn.functional.cross_entropy(logits[:-1], window[1:])))
            after = logits[::_KL_STEP].log_softmax(-1)
            if len(self.original) == number:
                self.original.append(after)
            before = self.original[number]
            divergences.append(float((before.exp() * (before - after)).sum(-1).mean()))
        return float(np.exp(np.mean(losses))), float(np.mean(divergences))


def _entry(name: str, bits: float, perplexity: float, kl: float) -> dict[str, Any]:
    return {"cache": name, "bits": bits, "perplexity": perplexity, "kl": kl}


if __name__ == "__main__":
    sys.exit(run(command))
