"""recipe.json and report.json: how a checkpoint was made, and what became of every group."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import psutil
import torch

from pipeline.compress.calibrated import Calibrated, Opened
from pipeline.compress.plan.plan import RankPlan
from pipeline.compress.request import CompressRequest
from pipeline.compress.walk import Compressed
from pipeline.provenance import provenance

_SCHEMA = 1


def parameter_count(model: torch.nn.Module) -> int:
    """Parameters of a model; those that are shared count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def build_report(
    compressed: Compressed, plan: RankPlan, total_before: int, seconds: float
) -> dict[str, Any]:
    """report.json: every group, and the totals."""
    groups = compressed.groups
    factored = [group for group in groups if group["form"] != "dense"]
    memory = psutil.Process().memory_info()
    totals = {
        "kept_fraction": plan.kept_fraction,
        "dense_parameters": sum(group["dense_parameters"] for group in groups),
        "kept_parameters": sum(group["kept_parameters"] for group in groups),
        "total_before": total_before,
        "total_after": total_before
        - sum(g["dense_parameters"] - g["kept_parameters"] for g in groups),
        "factored": len(factored),
        "kept_dense": len(groups) - len(factored),
        "in_few_bits": sum("up_style" in group for group in groups)
        + len(set(plan.tables.values())),
        "largest": max((g.get("largest_interpolation", 0.0) for g in factored), default=0.0),
        "seconds": seconds,
        "resident_bytes": memory.rss,
    }
    return {"schema": _SCHEMA, "totals": totals, "groups": groups}


def recipe_of(
    request: CompressRequest, opened: Opened, calibrated: Calibrated, dtype: torch.dtype
) -> dict[str, Any]:
    """recipe.json: all that is needed to make the checkpoint again."""
    return {
        "schema": _SCHEMA,
        **opened.recipe_fields,
        "model": request.model,
        "label": opened.source.label,
        "dtype": str(dtype).removeprefix("torch."),
        "held_dtype": str(opened.model.dtype).removeprefix("torch."),
        "settings": asdict(request),
        "method": request.resolved_method.describe(),
        "effort": asdict(request.resolved_effort),
        "calibration": calibrated.describe(),
        "provenance": provenance(),
    }
