"""From a request to a compressed checkpoint on disk: load, calibrate, compress, save."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline.artefact import (
    discard,
    discard_unfinished,
    sha256_of_file,
    staged_folder,
    write_json,
    write_text,
)
from pipeline.calibrate.text import TokenBatch, load_tokens
from pipeline.checkpoint.card import model_card
from pipeline.checkpoint.folder import DTYPES, save_checkpoint
from pipeline.compress.channel_scaling import balance_
from pipeline.compress.embeddings import round_tables_
from pipeline.compress.finished_layers import FinishedLayers
from pipeline.compress.plan.chart import save_plan_chart
from pipeline.compress.plan.layer_costs import Survey, survey_bytes
from pipeline.compress.plan.make_plan import make_plan
from pipeline.compress.plan.plan import RankPlan
from pipeline.compress.request import CompressRequest
from pipeline.compress.walk import Compressed, compress_
from pipeline.errors import InputError
from pipeline.model.load import LoadedModel, load_model
from pipeline.model.structure import Group, Layer, decoder_structure
from pipeline.model.task import IMAGES, task_of_model
from pipeline.progress import note
from pipeline.provenance import provenance

SCHEMA = 1
WORK, SURVEY = "layers", "survey"


def compress_to_folder(
    request: CompressRequest,
    output: Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    loaded: LoadedModel | None = None,
    tokens: TokenBatch | None = None,
) -> dict[str, Any]:
    """Compress a model and write its checkpoint folder.

    The unfinished folder is kept when the run is interrupted or fails, and `resume` continues it.

    Args:
        request: what to do.
        output: the folder to write.
        overwrite: replace it if it exists.
        resume: continue an unfinished run with the same request.
        loaded: the model, if it is in memory already; changed in place.
        tokens: calibration text, if it is at hand already.

    Returns:
        report.json's content.

    Raises:
        PipelineError: bad input, or not enough disk.
    """
    if loaded is None and task_of_model(request.model) == IMAGES:
        from pipeline.vision.recipe import compress_images_to_folder

        return compress_images_to_folder(request, output, overwrite=overwrite, resume=resume)
    request.check()
    started = time.monotonic()
    discard_unfinished(output, resume=resume)
    loaded = loaded or _load(request)
    dtype = stored_dtype(request, loaded.storage_dtype)
    layers = decoder_structure(loaded.model)
    needed_bytes = _needed_bytes(request, loaded, layers, dtype)
    with staged_folder(
        output, overwrite=overwrite, resume=True, required_bytes=needed_bytes
    ) as folder:
        total_before = parameter_count(loaded.model)
        tokens = tokens or calibration_tokens(request, loaded)
        require_tokens(tokens, layers)
        plan, compressed = _compress_in(folder, request, loaded, layers, tokens, dtype)
        report = build_report(compressed, plan, total_before, time.monotonic() - started)
        recipe = recipe_of(request, loaded, dtype, tokens)
        _write(folder, loaded, compressed, plan, dtype, recipe, report)
        discard(folder / WORK)
        discard(folder / SURVEY)
    return report


def stored_dtype(request: CompressRequest, published: torch.dtype) -> torch.dtype:
    """Of what is not in few bits: as asked, as published, or float16 under a budget of bytes."""
    if request.dtype != "auto":
        return DTYPES[request.dtype]
    if request.searches_bits and published.itemsize > torch.float16.itemsize:
        note("under a budget of bytes what is not in few bits is stored in float16")
        return torch.float16
    return published


def _load(request: CompressRequest) -> LoadedModel:
    return load_model(
        request.model,
        dtype=None,
        stream_weights=request.stream_weights,
        trust_remote_code=request.trust_remote_code,
        window_length=request.resolved_effort.window_length,
    )


def _needed_bytes(
    request: CompressRequest, loaded: LoadedModel, layers: list[Layer], dtype: torch.dtype
) -> int:
    """Bytes on disk: the checkpoint, its finished layers beside it, and the survey."""
    needed_bytes = 2 * sum(p.numel() for p in loaded.model.parameters()) * dtype.itemsize
    if request.resolved_method.needs_survey:
        effort = request.resolved_effort
        needed_bytes += survey_bytes(layers, effort.survey_windows * effort.window_length)
    return needed_bytes


def _compress_in(
    folder: Path,
    request: CompressRequest,
    loaded: LoadedModel,
    layers: list[Layer],
    tokens: TokenBatch,
    dtype: torch.dtype,
) -> tuple[RankPlan, Compressed]:
    """Plan and compress, with all that an interrupted run needs kept in the folder."""
    settings = asdict(request) | {"dtype": str(dtype).removeprefix("torch.")}
    formats = [style.name for style in request.formats]
    identity = settings | {"text": tokens.describe()["sha256"], "formats": formats}
    survey = Survey(folder / SURVEY, identity)
    if request.balance:
        balance_(loaded.model, layers, tokens.tokens, request.balance)
    plan = make_plan(request, loaded.model, layers, tokens.tokens, survey)
    followed = sha256_of_file(Path(request.plan)) if request.plan else None
    compressed = compress_(
        loaded.model,
        layers,
        plan,
        tokens.tokens,
        dtype=dtype,
        fit=request.resolved_method.fit,
        survey=survey,
        finished=FinishedLayers(folder / WORK, identity | {"plan": followed}),
    )
    nearest = request.resolved_method.fit.nearest
    entries, _ = round_tables_(loaded.model, plan.tables, tokens.tokens, plain=nearest)
    compressed.modules |= entries
    return plan, compressed


def plan_only(request: CompressRequest) -> RankPlan:
    """The plan that compressing would follow; nothing is written.

    Raises:
        PipelineError: bad input.
    """
    if task_of_model(request.model) == IMAGES:
        from pipeline.vision.recipe import plan_images_only

        return plan_images_only(request)
    request.check()
    loaded = _load(request)
    layers = decoder_structure(loaded.model)
    uniform = request.resolved_method.allocation == "uniform"
    if request.plan or uniform:
        return make_plan(request, loaded.model, layers, torch.empty(0), None)
    tokens = calibration_tokens(request, loaded)
    require_tokens(tokens, layers)
    with tempfile.TemporaryDirectory() as folder:
        survey = Survey(Path(folder), {})
        return make_plan(request, loaded.model, layers, tokens.tokens, survey)


def calibration_tokens(request: CompressRequest, loaded: LoadedModel) -> TokenBatch:
    """The windows that the request asks for."""
    effort = request.resolved_effort
    if request.calibration == "self":
        note(
            f"calibration: {effort.windows} windows of {effort.window_length} tokens, "
            "sampled from the model itself (--calibration takes a text file or wikitext2+c4)"
        )
    return load_tokens(
        request.calibration,
        loaded.tokenizer,
        loaded.model,
        count=effort.windows,
        length=effort.window_length,
        seed=request.seed,
    )


def require_tokens(tokens: TokenBatch, layers: list[Layer]) -> None:
    """Refuse calibration text that cannot determine the second moments.

    Raises:
        InputError: fewer tokens than the widest input has entries; says how many are needed.
    """
    widest = max((group for layer in layers for group in layer.groups), key=_in_features)
    count = tokens.tokens.numel()
    if count < widest.in_features:
        raise InputError(
            "The calibration text is too short for the widths of the model.",
            where=tokens.source,
            observed=f"{count} tokens; {widest.name} reads {widest.in_features} numbers at once, "
            "and as many tokens leave directions unseen that factors would then drop",
            expected=f"at least {widest.in_features} tokens, better {8 * widest.in_features}",
            change="raise --windows or --window-length",
        )


def _in_features(group: Group) -> int:
    return group.in_features


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
    return {"schema": SCHEMA, "totals": totals, "groups": groups}


def recipe_of(
    request: CompressRequest, loaded: LoadedModel, dtype: torch.dtype, tokens: TokenBatch
) -> dict[str, Any]:
    """recipe.json: all that is needed to make the checkpoint again."""
    return {
        "schema": SCHEMA,
        "model": request.model,
        "label": loaded.source.label,
        "dtype": str(dtype).removeprefix("torch."),
        "held_dtype": str(loaded.model.dtype).removeprefix("torch."),
        "settings": asdict(request),
        "method": asdict(request.resolved_method),
        "effort": asdict(request.resolved_effort),
        "calibration": tokens.describe(),
        "provenance": provenance(),
    }


def _write(
    folder: Path,
    loaded: LoadedModel,
    compressed: Compressed,
    plan: RankPlan,
    dtype: torch.dtype,
    recipe: dict[str, Any],
    report: dict[str, Any],
) -> None:
    save_checkpoint(compressed.model, loaded.tokenizer, compressed.modules, folder, dtype)
    report["totals"]["stored_bytes"] = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    report["tables"] = plan.tables
    plan.save(folder / "plan.json")
    save_plan_chart(plan, folder / "plan.svg")
    write_json(folder / "recipe.json", recipe)
    write_json(folder / "report.json", report)
    write_text(folder / "README.md", model_card(recipe, report))
