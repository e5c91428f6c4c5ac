"""From a request to a compressed checkpoint on disk: open, calibrate, plan, compress, save."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline import __version__
from pipeline.artefact import (
    discard,
    require_free_bytes,
    sha256_of_file,
    staged_folder,
    write_json,
    write_text,
)
from pipeline.checkpoint.card import model_card
from pipeline.checkpoint.folder import DTYPES, save_checkpoint, weights_record
from pipeline.compress.cache.cache_plan import CachePlan
from pipeline.compress.calibrated import Calibrated, Opened
from pipeline.compress.convolutions import round_to_folder
from pipeline.compress.finished_layers import FinishedLayers
from pipeline.compress.methods import METHODS
from pipeline.compress.plan.chart import save_plan_chart
from pipeline.compress.plan.make_plan import make_plan
from pipeline.compress.plan.plan import RankPlan
from pipeline.compress.request import CompressRequest
from pipeline.compress.walk import Compressed, compress_
from pipeline.errors import UsageError
from pipeline.lazy import imported
from pipeline.model.fingerprint import model_hashes
from pipeline.model.numbers import require_fitting
from pipeline.model.origins import remember_origin
from pipeline.model.task import adapter_of, task_of_model
from pipeline.progress import note
from pipeline.provenance import provenance, public_name
from pipeline.workers.workers import IN_PROCESS, Workers

_WORK, _COSTS, _CACHE = "layers", "survey", "cache"


def compress_to_folder(
    request: CompressRequest,
    output: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    opened: Opened | None = None,
    workers: Workers = IN_PROCESS,
) -> dict[str, Any]:
    """Compress a model and write its checkpoint folder.

    The unfinished folder is kept when the run is interrupted or fails, and `resume` continues it.

    Args:
        request: what to do.
        output: the folder to write.
        overwrite: replace it if it exists.
        resume: continue an unfinished run with the same request.
        opened: the model, if it is in memory already; changed in place.
        workers: who computes what is independent of all else.

    Returns:
        report.json's content.

    Raises:
        PipelineError: bad input, or not enough disk.
    """
    if METHODS[request.method].convolutions is not None:
        _require_no_workers(request, workers)
        return round_to_folder(request, output, overwrite=overwrite, resume=resume)
    started = time.monotonic()
    with staged_folder(
        output, overwrite=overwrite, keep=True, resume=resume, inputs=request.paths.values()
    ) as folder:
        opened = opened or _open_model(request)
        dtype = _stored_dtype(request, opened.storage_dtype)
        require_fitting(opened.model, dtype, request.model)
        require_free_bytes(folder, opened.needed_bytes(dtype))
        total_before = parameter_count(opened.model)
        settings = asdict(request) | {"dtype": str(dtype).removeprefix("torch.")}
        settings |= {"formats": [format.name for format in request.formats]}
        files = model_hashes(request.model)
        # Not the path: a model that was moved is the same.
        settings |= {"model": None, "model_files": files, "version": __version__}
        calibrated = opened.calibrate(folder / _COSTS, settings, workers)
        plan, compressed = _compress(folder, request, calibrated, settings, dtype)
        cache = _shrink_cache(folder, request, plan, calibrated, settings)
        added, seconds = calibrated.added_parameters, time.monotonic() - started
        report = _build_report(compressed, plan, total_before, added, seconds)
        report |= opened.report_fields | {"computed_by": workers.describe()}
        recipe = _recipe_of(request, opened, calibrated, dtype, files)
        if recipe["model_is_local"]:
            remember_origin(files, Path(request.model))
        _write(folder, opened, compressed, plan, cache, dtype, recipe, report)
        for work in (_WORK, _COSTS, _CACHE):
            discard(folder / work)
    return report


def plan_only(request: CompressRequest, workers: Workers = IN_PROCESS) -> RankPlan:
    """The plan that compressing would follow; nothing is written.

    Raises:
        PipelineError: bad input, or a method without a plan of ranks.
    """
    if METHODS[request.method].convolutions is not None:
        raise UsageError(
            "There is no plan of ranks to show.", where=f"--dry-run with --method {request.method}"
        )
    opened = _open_model(request)
    with tempfile.TemporaryDirectory() as folder:
        return make_plan(request, opened.calibrate(Path(folder), {}, workers))


def _require_no_workers(request: CompressRequest, workers: Workers) -> None:
    """Refuse workers for a method that rounds convolutions, each on what the last one returns."""
    if workers is not IN_PROCESS:
        raise UsageError(
            "This method computes nothing that is independent of the rest.",
            where=f"--workers with --method {request.method}",
            change="leave --workers out",
        )


def _open_model(request: CompressRequest) -> Opened:
    """The model that a request names, loaded and looked at as its task asks.

    Raises:
        PipelineError: a request that cannot be meant, or a model that cannot be compressed.
    """
    opened: Opened = adapter_of(task_of_model(request.model), "compress")(request)
    return opened


def _stored_dtype(request: CompressRequest, published: torch.dtype) -> torch.dtype:
    """Of what is not quantised: as asked, as published, or float16 under a budget of bytes."""
    if request.dtype != "auto":
        return DTYPES[request.dtype]
    if request.searches_bits and published.itemsize > torch.float16.itemsize:
        note("under a budget of bytes what is not quantised is stored in float16")
        return torch.float16
    return published


def _compress(
    folder: Path,
    request: CompressRequest,
    calibrated: Calibrated,
    settings: dict[str, Any],
    dtype: torch.dtype,
) -> tuple[RankPlan, Compressed]:
    """Plan and compress, with all that an interrupted run needs kept in the folder."""
    plan = make_plan(request, calibrated)
    calibrated.measure(request)
    fit = request.resolved_method.fit
    identity = settings | {
        "inputs": calibrated.describe()["sha256"],
        "plan": sha256_of_file(Path(request.plan)) if request.plan else None,
    }
    finished = FinishedLayers(folder / _WORK, identity)
    compressed = compress_(calibrated, plan, dtype=dtype, fit=fit, finished=finished)
    compressed.modules |= calibrated.quantize_embeddings_(plan.embeddings, imported(fit.quantize))
    return plan, compressed


def _shrink_cache(
    folder: Path,
    request: CompressRequest,
    plan: RankPlan,
    calibrated: Calibrated,
    settings: dict[str, Any],
) -> CachePlan | None:
    """Maps for the cache, where a budget or the user's plan asks for them; None where not."""
    if not request.shrinks_cache and plan.caches is None:
        return None
    identity = settings | {"inputs": calibrated.describe()["sha256"]}
    return calibrated.shrink_cache_(request, plan.caches, folder / _CACHE, identity)


def _write(
    folder: Path,
    opened: Opened,
    compressed: Compressed,
    plan: RankPlan,
    cache: CachePlan | None,
    dtype: torch.dtype,
    recipe: dict[str, Any],
    report: dict[str, Any],
) -> None:
    save_checkpoint(
        compressed.model,
        opened.processor,
        compressed.modules,
        folder,
        dtype,
        source=opened.source.folder(),
        caches=None if cache is None else cache.entries(),
    )
    weights = weights_record(folder)
    report["totals"]["stored_bytes"] = sum(file["bytes"] for file in weights.values())
    report |= {"tables": plan.embeddings, "weights": weights}
    if cache is not None:
        report["cache"] = {
            "dense_bytes": cache.dense_bytes,
            "token_bytes": cache.token_bytes,
            "kept_fraction": cache.kept_fraction,
        }
    replace(plan, caches=None if cache is None else cache.to_json()).save(folder / "plan.json")
    save_plan_chart(plan, folder / "plan.svg")
    write_json(folder / "recipe.json", recipe)
    write_json(folder / "report.json", report)
    write_text(folder / "README.md", model_card(recipe, report))


_SCHEMA = 1


def parameter_count(model: torch.nn.Module) -> int:
    """Parameters of a model; those that are shared count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _build_report(
    compressed: Compressed, plan: RankPlan, total_before: int, added: int, seconds: float
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
        + added
        - sum(g["dense_parameters"] - g["kept_parameters"] for g in groups),
        "factored": len(factored),
        "kept_dense": len(groups) - len(factored),
        "in_few_bits": sum("up_style" in group for group in groups)
        + len(set(plan.embeddings.values())),
        "largest": max((g.get("largest_interpolation", 0.0) for g in factored), default=0.0),
        "seconds": seconds,
        "resident_bytes": memory.rss,
    }
    return {"schema": _SCHEMA, "totals": totals, "groups": groups}


def _recipe_of(
    request: CompressRequest,
    opened: Opened,
    calibrated: Calibrated,
    dtype: torch.dtype,
    files: dict[str, str],
) -> dict[str, Any]:
    """recipe.json: all that is needed to make the checkpoint again, and nothing of this machine."""
    named = {name: public_name(value) for name, value in request.paths.items()}
    return {
        "schema": _SCHEMA,
        **opened.recipe_fields,
        "model": named["model"],
        "model_is_local": Path(request.model).expanduser().exists(),
        "model_files": files,
        "label": opened.source.label,
        "dtype": str(dtype).removeprefix("torch."),
        "held_dtype": str(opened.model.dtype).removeprefix("torch."),
        "settings": asdict(request) | named,
        "method": request.resolved_method.describe(),
        "effort": asdict(request.resolved_effort),
        "calibration": calibrated.describe(),
        "provenance": provenance(),
    }
