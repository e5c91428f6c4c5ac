"""What each group of matrices was expected to cost, against what it costs.

    python -m benchmarks.quality.planned_cost --calibration CALIBRATION.txt

A plan under a budget of bytes is made as `skipcat compress --keep-bytes` makes it. Then every group
in turn is compressed alone, all others left as they are, and the KL to the original is measured on
the last tenth of the calibration text. The figure is the rank correlation of the two costs over
all groups, and over the layers (all groups of a layer together). Both as `--effort fast` plans, and
with a price a layer, as the other efforts do (`priced`).
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from scipy.stats import spearmanr

from benchmarks import RESULTS
from benchmarks.command import run
from benchmarks.quality.evaluation_texts import hash_of_text, tokens_of
from pipeline.artefact import write_json
from pipeline.bench.measure import describe_machine
from pipeline.calibrate.divergence import divergence, log_chances
from pipeline.calibrate.text import TokenBatch
from pipeline.compress.decoder import CalibratedDecoder
from pipeline.compress.finished_layers import FinishedLayers
from pipeline.compress.layer_prices import compressed_for_a_while
from pipeline.compress.methods import Effort, Fit
from pipeline.compress.plan.layer_costs import LayerCosts
from pipeline.compress.plan.make_plan import make_plan
from pipeline.compress.plan.plan import GroupPlan, RankPlan
from pipeline.compress.request import CompressRequest
from pipeline.compress.walk import compress_
from pipeline.model.load import LoadedModel, load_model
from pipeline.model.structure import decoder_structure
from pipeline.progress import note, track
from pipeline.provenance import provenance

_RESULT = RESULTS / "planned_cost.json"


@click.command()
@click.option("--calibration", required=True, help="Calibration text.")
@click.option("--model", default="smollm2-135m", show_default=True)
@click.option("--keep-bytes", type=float, default=0.25, show_default=True)
@click.option("--held-out", type=int, default=4, show_default=True, help="Windows of 256 tokens.")
@click.option("--work", type=click.Path(path_type=Path), help="Keep the survey here.")
@click.option("--json", "result", type=click.Path(path_type=Path), default=_RESULT)
def command(
    calibration: str, model: str, keep_bytes: float, held_out: int, work: Path | None, result: Path
) -> None:
    """Correlate expected and measured KL over groups and layers."""
    request = CompressRequest(
        model, keep_bytes=keep_bytes, runtime="any", effort="fast", calibration=calibration
    )
    request.check()
    loaded = load_model(model, dtype=torch.float32)
    effort = request.resolved_effort
    tokens = tokens_of(calibration, loaded, effort.windows, effort.window_length, request.seed)
    windows = _last_windows(calibration, loaded, held_out)
    record: dict[str, Any] = {
        "schema": 1,
        "model": model,
        "keep_bytes": keep_bytes,
        "calibration_sha256": hash_of_text(Path(calibration)),
        "held_out_tokens": held_out * 256,
        "machine": describe_machine(),
        "provenance": provenance(),
    }
    with tempfile.TemporaryDirectory() as scratch:
        survey = (work or Path(scratch)) / "survey-ours"
        record |= _planned_and_measured(request, loaded, tokens, survey, windows)
        write_json(result, record)
        priced = _Priced(**{f.name: getattr(request, f.name) for f in fields(request)})
        record["priced"] = _planned_and_measured(priced, loaded, tokens, survey, windows)
    write_json(result, record)
    click.echo(json.dumps([record["correlation"], record["priced"]["correlation"]], indent=2))


class _Priced(CompressRequest):
    """With a price a layer, which its effort alone does not measure."""

    @property
    def resolved_effort(self) -> Effort:
        return replace(super().resolved_effort, prices=True)


def _planned_and_measured(
    request: CompressRequest,
    loaded: LoadedModel,
    tokens: TokenBatch,
    survey: Path,
    windows: torch.Tensor,
) -> dict[str, Any]:
    """A plan as the request makes it, and what each of its parts costs alone."""
    costs = LayerCosts(survey, {"text": tokens.describe()["sha256"]})
    layers = decoder_structure(loaded.model)
    plan = make_plan(request, CalibratedDecoder.at_hand(loaded.model, layers, tokens, costs))
    with tempfile.TemporaryDirectory() as scratch:
        finished = FinishedLayers(Path(scratch), {"keep_bytes": request.keep_bytes})
        ready = CalibratedDecoder.at_hand(copy.deepcopy(loaded.model), layers, tokens, costs)
        compress_(ready, plan, dtype=torch.float32, fit=Fit(), finished=finished)
        rows = _costs(loaded, plan, finished, windows)
    return {"correlation": _correlations(rows), "rows": rows}


def _last_windows(calibration: str, loaded: LoadedModel, count: int) -> torch.Tensor:
    """The end of the calibration text, int64 [count, 256]; windows for fitting come from all of it.

    Costs are compared with one another, not claimed for unseen text.
    """
    text = Path(calibration).read_text(encoding="utf-8")
    ids = loaded.tokenizer(text[-count * 256 * 8 :])["input_ids"][-count * 256 :]
    return torch.tensor(ids).view(count, 256)


def _costs(
    loaded: LoadedModel, plan: RankPlan, finished: FinishedLayers, windows: torch.Tensor
) -> list[dict[str, Any]]:
    """Expected and measured KL of every group that the plan changes, and of every layer."""
    model = loaded.model
    expected = [log_chances(_logits(model, window)) for window in windows]
    rows = []
    for layer, groups in track(list(plan.layers.items()), "costs"):
        tensors, _ = finished.load(layer)
        changed = [group for group in groups if not group.is_unchanged]
        parts = [[group] for group in changed] + ([changed] if len(changed) > 1 else [])
        for part in parts:
            rows.append(
                {
                    "layer": layer,
                    "members": [m for group in part for m in group.members],
                    "whole_layer": len(part) == len(changed),
                    "alone": len(part) == 1,
                    "form": part[0].form,
                    "styles": [part[0].down_format, part[0].up_format],
                    "rank": part[0].rank,
                    "expected_kl": sum(group.expected_kl or 0.0 for group in part),
                    "measured_kl": _measured(model, part, tensors, windows, expected),
                }
            )
    return rows


@torch.no_grad()
def _measured(
    model: Any,
    groups: list[GroupPlan],
    tensors: dict[str, torch.Tensor],
    windows: torch.Tensor,
    expected: list[torch.Tensor],
) -> float:
    """Mean KL to the original with some groups compressed; the model is as it was afterwards."""
    with compressed_for_a_while(model, groups, tensors):
        losses = [
            divergence(before, _logits(model, window))
            for window, before in zip(windows, expected, strict=True)
        ]
    return float(np.mean(losses))


@torch.no_grad()
def _logits(model: Any, window: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=window[None], use_cache=False).logits
    return logits[0]


def _correlations(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Spearman's rank correlation, and the median ratio of measured to expected."""
    found = {}
    for name, chosen in (
        ("groups", [row for row in rows if row["alone"]]),
        ("layers", [row for row in rows if row["whole_layer"]]),
    ):
        planned, measured = (
            np.array([row[key] for row in chosen]) for key in ("expected_kl", "measured_kl")
        )
        found[name] = {
            "count": len(chosen),
            "rank_correlation": float(spearmanr(planned, measured).statistic),
            "median_measured_over_expected": float(np.median(measured / planned)),
        }
    return found


if __name__ == "__main__":
    note("planned against measured cost")
    sys.exit(run(command))
