"""From a request to a compressed checkpoint on disk: load, calibrate, compress, save."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline.artefact import partial_path, staged_folder, write_json, write_text
from pipeline.calibrate.text import TokenBatch, load_tokens
from pipeline.compress.card import model_card
from pipeline.compress.checkpoint import save_checkpoint
from pipeline.compress.compress import Compressed, compress_
from pipeline.compress.plan import RankPlan, load_plan, uniform_plan
from pipeline.compress.work import FinishedLayers
from pipeline.errors import ResourceError, UsageError
from pipeline.model.load import LoadedModel, load_model
from pipeline.model.structure import Layer, decoder_structure
from pipeline.progress import note
from pipeline.provenance import provenance

SCHEMA = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WORK = "layers"


@dataclass(frozen=True)
class CompressRequest:
    """What to compress, and how.

    Attributes:
        model: alias, hub id, folder or GGUF file.
        keep_params: fraction of the decoder's linear parameters to keep, in (0, 1].
        cat: share the right factor among matrices with the same input.
        skip: store factors in block-skip form.
        rank_multiple: round ranks down to a multiple of this.
        plan: a plan.json to follow instead of the uniform one.
        calibration: `self`, `wikitext2+c4`, or a text file.
        windows: calibration windows.
        window_length: tokens in each.
        seed: of the calibration text.
        dtype: of the weights on disk; "auto" for that of the original.
        trust_remote_code: let the model's own code run.
    """

    model: str
    keep_params: float = 0.8
    cat: bool = True
    skip: bool = True
    rank_multiple: int = 1
    plan: str | None = None
    calibration: str = "self"
    windows: int = 256
    window_length: int = 128
    seed: int = 0
    dtype: str = "auto"
    trust_remote_code: bool = False

    def check(self) -> None:
        """Refuse values that cannot be meant, before any work is done.

        Raises:
            UsageError: names the value and its range.
        """
        if not 0 < self.keep_params <= 1:
            raise UsageError(
                "The kept fraction is out of range.",
                where="--keep-params",
                observed=self.keep_params,
                expected="a number in (0, 1]; 0.8 keeps 80% of the decoder's linear parameters",
            )
        for name in ("rank_multiple", "windows", "window_length"):
            if getattr(self, name) < 1:
                raise UsageError(
                    "A count must be at least 1.",
                    where="--" + name.replace("_", "-"),
                    observed=getattr(self, name),
                )


def plan_for(request: CompressRequest, layers: list[Layer]) -> RankPlan:
    """The plan that the request names, or the uniform one."""
    if request.plan:
        return load_plan(Path(request.plan), layers)
    return uniform_plan(
        layers,
        request.keep_params,
        cat=request.cat,
        skip=request.skip,
        multiple=request.rank_multiple,
    )


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
    request.check()
    started = time.monotonic()
    if partial_path(output).exists() and not resume:
        note(f"an unfinished run in {partial_path(output)} is discarded (--resume continues one)")
        _discard(partial_path(output))
    loaded = loaded or load_model(
        request.model,
        trust_remote_code=request.trust_remote_code,
        window_length=request.window_length,
    )
    dtype = loaded.storage_dtype if request.dtype == "auto" else DTYPES[request.dtype]
    needed_bytes = 2 * sum(p.numel() for p in loaded.model.parameters()) * dtype.itemsize
    with staged_folder(
        output, overwrite=overwrite, resume=True, required_bytes=needed_bytes
    ) as folder:
        layers = decoder_structure(loaded.model)
        plan = plan_for(request, layers)
        total_before = parameter_count(loaded.model)
        tokens = tokens or calibration_tokens(request, loaded)
        settings = asdict(request) | {"dtype": str(dtype).removeprefix("torch.")}
        identity = settings | {"text": tokens.describe()["sha256"]}
        work = FinishedLayers(folder / WORK, identity)
        compressed = compress_(
            loaded.model, layers, plan, tokens.tokens, dtype=dtype, finished=work
        )
        report = build_report(compressed, plan, total_before, time.monotonic() - started)
        recipe = recipe_of(request, loaded, dtype, tokens)
        _write(folder, loaded, compressed, plan, dtype, recipe, report)
        _discard(folder / WORK)
    return report


def calibration_tokens(request: CompressRequest, loaded: LoadedModel) -> TokenBatch:
    """The windows that the request asks for."""
    if request.calibration == "self":
        note(
            f"calibration: {request.windows} windows of {request.window_length} tokens, "
            "sampled from the model itself (--calibration takes a text file or wikitext2+c4)"
        )
    return load_tokens(
        request.calibration,
        loaded.tokenizer,
        loaded.model,
        count=request.windows,
        length=request.window_length,
        seed=request.seed,
    )


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
        "total_after": parameter_count(compressed.model),
        "factored": len(factored),
        "kept_dense": len(groups) - len(factored),
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
        "settings": asdict(request),
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
    plan.save(folder / "plan.json")
    write_json(folder / "recipe.json", recipe)
    write_json(folder / "report.json", report)
    write_text(folder / "README.md", model_card(recipe, report))


def _discard(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise ResourceError("A working folder cannot be removed.", where=folder) from error
