"""What each idea gives, alone and together, on text that no final figure is measured on.

    python -m benchmarks.quality.ablation --calibration VALID.txt

The first nine tenths of the calibration text calibrate, and the rest tests: choices that were made
by these rows are not choices made on the test split. KL to the dense model, and perplexity, on
windows of 2048 tokens.
"""

from __future__ import annotations

import copy
import gc
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table

from benchmarks import RESULTS
from benchmarks.command import run
from benchmarks.quality.evaluation_texts import hash_of_text, tokens_of
from benchmarks.quality.recorded_session import RecordedSession
from pipeline.artefact import write_json
from pipeline.bench.measure import describe_machine, load_average
from pipeline.compress.decoder import CalibratedDecoder
from pipeline.compress.methods import EFFORTS, Fit
from pipeline.compress.plan.layer_costs import LayerCosts
from pipeline.compress.plan.plan import RankPlan, uniform_plan
from pipeline.compress.plan.rank_search import searched_plan
from pipeline.compress.plan.stack_costs import CostRequest
from pipeline.compress.walk import compress_
from pipeline.model.load import load_model
from pipeline.model.structure import Layer, decoder_structure
from pipeline.progress import note, result_console
from pipeline.provenance import provenance
from pipeline.runtime.sessions.torch_session import TorchSession
from validate.quality import measure_quality

_RESULT = RESULTS / "ablation.json"
_CALIBRATING = 0.9


@dataclass(frozen=True)
class _Variant:
    """One row: where rank goes, whether matrices may share, and how they are fitted."""

    name: str
    searched: bool
    cat: bool
    fit: Fit

    def plan(self, layers: list[Layer], survey: LayerCosts, keep: float) -> RankPlan:
        """The plan at a budget."""
        if self.searched:
            return searched_plan(layers, survey.curves, keep, cat=self.cat)
        return uniform_plan(layers, keep, cat=self.cat)


_VARIANTS = (
    _Variant("SkipCat", False, True, Fit(two_sided=False)),
    _Variant("two-sided, uniform ranks", False, True, Fit()),
    _Variant("searched ranks, one-sided", True, True, Fit(two_sided=False)),
    _Variant("searched ranks, nothing shared, two-sided", True, False, Fit()),
    _Variant("searched ranks and sharing, two-sided", True, True, Fit()),
    _Variant("that, targets of mix 0.5", True, True, Fit(mix=0.5)),
    _Variant("that, targets of mix 0", True, True, Fit(mix=0.0)),
    _Variant("that, targets of mix 1", True, True, Fit(mix=1.0)),
)


@click.command()
@click.option("--calibration", type=click.Path(path_type=Path), required=True)
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--keep", type=float, default=0.8, show_default=True)
@click.option("--effort", type=click.Choice(list(EFFORTS)), default="fast", show_default=True)
@click.option("--test-windows", type=int, default=4, show_default=True)
@click.option("--json", "result", type=click.Path(path_type=Path), default=_RESULT)
def command(
    calibration: Path, model: str, keep: float, effort: str, test_windows: int, result: Path
) -> None:
    """Measure every variant on the same tokens."""
    record: dict[str, Any] = {
        "settings": {"model": model, "keep": keep, "effort": EFFORTS[effort].__dict__,
                     "calibration": calibration.name, "sha256": hash_of_text(calibration)},
        "machine": describe_machine(), "provenance": provenance(), "rows": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        for row in _measured_rows(calibration, model, keep, effort, test_windows, Path(scratch)):
            record["rows"].append(row)
            write_json(result, record)
            note(f"{row['variant']}: KL {row['kl_to_dense']:.4f}")
    _show(record["rows"])


def _measured_rows(
    calibration: Path, model: str, keep: float, effort: str, test_windows: int, scratch: Path
) -> Any:
    """Yield a row for each variant."""
    loaded = load_model(model, dtype=torch.float32)
    layers = decoder_structure(loaded.model)
    texts = _split(calibration, scratch)
    count, length = EFFORTS[effort].windows, EFFORTS[effort].window_length
    tokens = tokens_of(str(texts[0]), loaded, count, length, 0)
    tests = tokens_of(str(texts[1]), loaded, test_windows, 2048, 0, sequential=True).tokens.numpy()
    reference = RecordedSession(TorchSession(loaded.model, "dense"), scratch / "logits")
    costs = LayerCosts(scratch / "survey", {})
    chosen = tokens.spread(EFFORTS[effort].survey_windows)
    costs.measure(loaded.model, layers, chosen, CostRequest())
    for variant in _VARIANTS:
        started = time.perf_counter()
        plan = variant.plan(layers, costs, keep)
        compressed = copy.deepcopy(loaded.model)
        ready = CalibratedDecoder.at_hand(compressed, layers, tokens, costs)
        compress_(ready, plan, dtype=torch.float32, fit=variant.fit)
        seconds = time.perf_counter() - started
        quality = measure_quality(TorchSession(compressed, variant.name), reference, tests)
        yield {
            "variant": variant.name,
            "kept_fraction": plan.kept_fraction,
            "kl_to_dense": quality.kl,
            "top1_to_dense": quality.top1,
            "perplexity": float(torch.tensor(quality.window_nlls).mean().exp()),
            "dense_perplexity": float(torch.tensor(quality.reference_nlls).mean().exp()),
            "seconds": round(seconds, 1),
            "load_average": load_average(),
        }
        del compressed
        gc.collect()  # a model is a web of cycles, and the next row needs its memory


def _split(text: Path, folder: Path) -> tuple[Path, Path]:
    """The part of a text that calibrates, and the part that tests."""
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    cut = int(_CALIBRATING * len(lines))
    parts = folder / "calibrates.txt", folder / "tests.txt"
    for path, part in zip(parts, (lines[:cut], lines[cut:]), strict=True):
        path.write_text("".join(part), encoding="utf-8")
    return parts


def _show(rows: list[dict[str, Any]]) -> None:
    """The table on stdout."""
    view = Table(title=f"dense perplexity {rows[0]['dense_perplexity']:.2f}")
    for heading in ("variant", "kept", "KL to dense", "top-1", "perplexity", "s"):
        view.add_column(heading, justify="left" if heading == "variant" else "right")
    for row in rows:
        view.add_row(
            row["variant"],
            f"{row['kept_fraction']:.1%}",
            f"{row['kl_to_dense']:.4f}",
            f"{row['top1_to_dense']:.1%}",
            f"{row['perplexity']:.2f}",
            f"{row['seconds']:.0f}",
        )
    result_console().print(view)


if __name__ == "__main__":
    sys.exit(run(command))
