"""From a request to a compressed image classifier on disk: load, calibrate, compress, save."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.artefact import (
    discard,
    discard_unfinished,
    sha256_of_file,
    staged_folder,
    write_json,
    write_text,
)
from pipeline.calibrate.images import ImageBatch, load_images, require_source
from pipeline.calibrate.whole_model import ImageSurvey
from pipeline.checkpoint.folder import save_checkpoint
from pipeline.compress.classifier import OneShotWalk, PropagatedWalk
from pipeline.compress.finished_layers import FinishedLayers
from pipeline.compress.plan.chart import save_plan_chart
from pipeline.compress.plan.plan import RankPlan
from pipeline.compress.request import CompressRequest
from pipeline.compress.walk import Compressed, Walk, compress_
from pipeline.errors import InputError, UsageError
from pipeline.model.classifier_structure import ImageStructure, image_structure
from pipeline.model.load_classifier import LoadedClassifier, load_classifier
from pipeline.progress import note
from pipeline.provenance import provenance
from pipeline.quantize.formats import RUNTIMES
from pipeline.vision.card import image_card
from pipeline.vision.planning import make_image_plan

SCHEMA = 1
WORK = "layers"
# However many patches an image has, so few images say too little about the model's own output.
LEAST_IMAGES = 256
# Inputs of a linear that go through the model at once, in as many images as have them.
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Calibrated:
    """A classifier that is ready to be planned and compressed."""

    loaded: LoadedClassifier
    structure: ImageStructure
    images: ImageBatch
    survey: ImageSurvey


def compress_images_to_folder(
    request: CompressRequest, output: Path, *, overwrite: bool = False, resume: bool = False
) -> dict[str, Any]:
    """Compress an image classifier and write its checkpoint folder.

    Args:
        request: what to do; its `windows` are images.
        output: the folder to write.
        overwrite: replace it if it exists.
        resume: continue an unfinished run with the same request; it keeps finished layers.

    Returns:
        report.json's content.

    Raises:
        PipelineError: bad input, or not enough disk.
    """
    from pipeline.compress.run import build_report, parameter_count, stored_dtype

    check_image_request(request)
    started = time.monotonic()
    discard_unfinished(output, resume=resume)
    ready = calibrate(request)
    loaded = ready.loaded
    dtype = stored_dtype(request, loaded.storage_dtype)
    total_before = parameter_count(loaded.model)
    with staged_folder(
        output, overwrite=overwrite, resume=True, required_bytes=2 * total_before * dtype.itemsize
    ) as folder:
        plan = make_image_plan(request, loaded.model, ready.structure.layers, ready.survey)
        identity = asdict(request) | {"images": ready.images.describe()["sha256"]}
        identity["plan"] = sha256_of_file(Path(request.plan)) if request.plan else None
        finished = FinishedLayers(folder / WORK, identity)
        compressed = _compress(request, ready, plan, dtype, finished)
        report = build_report(compressed, plan, total_before, time.monotonic() - started)
        report["left_out"] = ready.structure.left_out
        recipe = recipe_of_images(request, ready, dtype)
        _write(folder, ready, compressed, plan, dtype, recipe, report)
        discard(folder / WORK)
    return report


def plan_images_only(request: CompressRequest) -> RankPlan:
    """The plan that compressing would follow; nothing is written.

    Raises:
        PipelineError: bad input.
    """
    check_image_request(request)
    ready = calibrate(request)
    return make_image_plan(request, ready.loaded.model, ready.structure.layers, ready.survey)


def check_image_request(request: CompressRequest) -> None:
    """Refuse what cannot be meant for an image classifier, before any work is done.

    Raises:
        UsageError: names the option.
    """
    request.check()
    require_source(request.calibration)
    for flag, given in (
        ("--window-length", request.window_length is not None),
        ("--stream-weights", request.stream_weights),
        ("--table", request.table is not None),
    ):
        if given:
            raise UsageError("This option is for language models.", where=flag)


def calibrate(request: CompressRequest) -> Calibrated:
    """Load the model and the images, and measure what the method needs to know.

    Raises:
        InputError: the model or the images do not fit.
    """
    loaded = load_classifier(request.model, trust_remote_code=request.trust_remote_code)
    structure = image_structure(loaded.model, loaded.input_shape)
    count = image_count(request, structure)
    images = load_images(
        request.calibration, loaded.model, loaded.processor, count=count, seed=request.seed
    )
    note(f"found: {describe(loaded, structure)}")
    note(f"calibration: {len(images.pixels)} images of {images.source}")
    for name, reason in structure.left_out.items():
        note(f"stays as it is: {name}: {reason}")
    require_images(images, structure)
    survey = ImageSurvey(loaded.model, structure.layers)
    method = request.resolved_method
    # A plan that keeps everything needs no gradients, nor does a method that is one-sided.
    bits = request.searches_bits or request.weights is not None
    gradients = bits or request.plan is not None or request.keep_params < 1
    survey.measure(
        images.pixels,
        gradients=gradients and method.needs_survey,
        cat=method.cat,
        seed=request.seed,
        styles=RUNTIMES[request.runtime].formats if request.searches_bits else (),
        form="skip" if method.skip else "low_rank",
        batch_size=batch_size(structure),
    )
    return Calibrated(loaded, structure, images, survey)


def describe(loaded: LoadedClassifier, structure: ImageStructure) -> str:
    """One line for the user: what the model is."""
    groups = [group for layer in structure.layers for group in layer.groups]
    linears = sum(len(group.members) for group in groups)
    return (
        f"{type(loaded.model).__name__}, an image classifier of {loaded.model.config.num_labels} "
        f"classes on {'x'.join(map(str, loaded.input_shape))} pixels; {linears} linear layers in "
        f"{len(groups)} groups that share an input; all else stays as it is"
    )


def image_count(request: CompressRequest, structure: ImageStructure) -> int:
    """Images to read: as asked for, or as many as have the patches of the effort's tokens."""
    if request.windows is not None:
        return request.windows
    effort = request.resolved_effort
    wanted = math.ceil(effort.windows * effort.window_length / max(structure.rows.values()))
    return max(wanted, LEAST_IMAGES)


def batch_size(structure: ImageStructure) -> int:
    """Images that go through the model at once."""
    return max(1, ROWS_AT_ONCE // max(structure.rows.values()))


def require_images(images: ImageBatch, structure: ImageStructure) -> None:
    """Refuse images that cannot determine the second moments.

    Raises:
        InputError: fewer inputs of some linear than it is wide; says how many images are needed.
    """
    needed = {
        group.name: math.ceil(group.in_features / structure.rows[group.name])
        for layer in structure.layers
        for group in layer.groups
    }
    widest = max(needed, key=lambda name: needed[name])
    if len(images.pixels) < needed[widest]:
        raise InputError(
            "There are too few images for the widths of the model.",
            where=images.source,
            observed=f"{len(images.pixels)} images; {widest} would see fewer inputs than it is "
            "wide, which leaves directions unseen that factors would then drop",
            expected=f"at least {needed[widest]}, better {8 * needed[widest]}",
            change="raise --windows, or give more images",
        )


def _compress(
    request: CompressRequest,
    ready: Calibrated,
    plan: RankPlan,
    dtype: torch.dtype,
    finished: FinishedLayers,
) -> Compressed:
    fit, model = request.resolved_method.fit, ready.loaded.model
    walk: Walk
    if fit.mix is None:
        walk = OneShotWalk(model, ready.survey)
    else:
        layers, pixels = ready.structure.layers, ready.images.pixels
        walk = PropagatedWalk(model, layers, pixels, batch_size(ready.structure))
    return compress_(
        model,
        ready.structure.layers,
        plan,
        torch.empty(0),
        dtype=dtype,
        fit=fit,
        survey=ready.survey,
        finished=finished,
        walk=walk,
    )


def recipe_of_images(
    request: CompressRequest, ready: Calibrated, dtype: torch.dtype
) -> dict[str, Any]:
    """recipe.json: all that is needed to make the checkpoint again."""
    return {
        "schema": SCHEMA,
        "task": "image-classification",
        "model": request.model,
        "label": ready.loaded.source.label,
        "dtype": str(dtype).removeprefix("torch."),
        "settings": asdict(request),
        "method": asdict(request.resolved_method),
        "calibration": ready.images.describe(),
        "provenance": provenance(),
    }


def _write(
    folder: Path,
    ready: Calibrated,
    compressed: Compressed,
    plan: RankPlan,
    dtype: torch.dtype,
    recipe: dict[str, Any],
    report: dict[str, Any],
) -> None:
    save_checkpoint(compressed.model, ready.loaded.processor, compressed.modules, folder, dtype)
    report["totals"]["stored_bytes"] = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    plan.save(folder / "plan.json")
    save_plan_chart(plan, folder / "plan.svg")
    write_json(folder / "recipe.json", recipe)
    write_json(folder / "report.json", report)
    write_text(folder / "README.md", image_card(recipe, report))
