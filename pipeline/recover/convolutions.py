"""Training a network of convolutions under rounding, towards the network it was rounded from."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.artefact import discard, require_same_run, staged_folder, write_json
from pipeline.calibrate.network import OpenedNetwork, open_network
from pipeline.checkpoint.folder import (
    load_checkpoint,
    read_record,
    save_checkpoint,
    weights_record,
)
from pipeline.errors import InputError, UsageError
from pipeline.int8.convert import Entries, WeightRounding, conv_names, folded_kernels
from pipeline.int8.outputs import output_error
from pipeline.int8.training import (
    finish_training_,
    scale_parameters,
    stored_rounding,
    train_rounded_,
)
from pipeline.progress import note
from pipeline.provenance import provenance, public_name
from pipeline.recover.request import RecoverRequest, held_out
from pipeline.training_state import Progress, TrainingState, take_steps_

_WORK, _MOST_IMAGES = "training", 512
_LARGEST_GRADIENT = 1.0
# Of scales, which are trained as logarithms, against kernels.
_SCALE_RATE = 5.0


def rounded_entries(checkpoint: Path) -> Entries:
    """What a checkpoint says of its rounded convolutions; nothing of one that has none."""
    config = read_record(checkpoint, "config.json")
    modules = (config.get("quantization_config") or {}).get("modules") or {}
    return modules if conv_names(modules) else {}


def train_to_folder(
    request: RecoverRequest, output: Path, *, overwrite: bool = False, resume: bool = False
) -> dict[str, Any]:
    """Train kernels, biases and scales of rounded convolutions, and write the result.

    Args:
        request: its `text` are images; the teacher is the network that was rounded.
        output: the folder to write.
        overwrite: replace it if it exists.
        resume: continue an unfinished run of the same request; the learning rate may differ.

    Returns:
        The `recovery` section of recipe.json.

    Raises:
        PipelineError: bad input, training that diverged, or not enough disk.
    """
    started = time.monotonic()
    if request.teacher is None:
        raise UsageError(
            "Rounded convolutions are trained towards the network that was rounded.",
            where="--teacher",
            observed="none",
            change="pass --teacher FOLDER, what compress was given as -m",
        )
    with staged_folder(
        output, overwrite=overwrite, keep=True, resume=resume, inputs=request.inputs_of(output)
    ) as folder:
        work = folder / _WORK
        work.mkdir(exist_ok=True)
        teacher = open_network(request.teacher)
        model = load_checkpoint(request.checkpoint, dtype=torch.float32)
        entries, rounding = _begin_(model, teacher)
        count = request.windows or min(request.steps * request.batch_size, _MOST_IMAGES)
        batches, described = teacher.read_batches(request.text, count, request.seed)
        images = torch.cat(batches)
        identity = _identity(request, described)
        settings = {name: v for name, v in identity.items() if name != "learning_rate"}
        require_same_run(settings, work / "run.json")
        loss, progress = _train(request, model, teacher.model, images, work / "state.safetensors")
        finish_training_(model, entries, rounding)
        recovery = {
            "method": "training under rounding (learned step sizes)",
            "objective": "distillation",
            "settings": identity,
            "learning_rates": progress.learning_rates,
            "images": described,
            "held_out_windows": held_out(len(images)),
            "loss": {"output_error": loss},
            "seconds": time.monotonic() - started,
            "provenance": provenance(),
        }
        _write(folder, request, teacher, model, entries, recovery)
        write_json(folder / "recovery.json", {"schema": 1, "losses": progress.losses})
        discard(work)
    return recovery


def _begin_(model: PreTrainedModel, teacher: OpenedNetwork) -> tuple[Entries, WeightRounding]:
    """Make a network of codes one that is trained, from the teacher's kernels and its own scales.

    Raises:
        InputError: the teacher is another network.
    """
    entries: Entries = model.config.quantization_config.modules
    grids, own, scales = stored_rounding(model, entries)
    try:
        kernels = folded_kernels(teacher.model, entries)
        fit = all(kernels[name][0].shape == own[name][0].shape for name in own)
    except (AttributeError, TypeError):
        fit = False
    if not fit:
        raise InputError(
            "The teacher has other convolutions than the checkpoint.",
            where=teacher.source.name,
            change="pass the network that the checkpoint was made from",
        )
    rounding = WeightRounding(min(entries[name]["bits"] for name in conv_names(entries)))
    # With it, save_pretrained would ignore the state that it is given.
    del model.hf_quantizer
    model.is_quantized = False
    train_rounded_(model, entries, grids, kernels, rounding, scales)
    return entries, rounding


def _identity(request: RecoverRequest, described: dict[str, Any]) -> dict[str, Any]:
    return {
        "checkpoint": public_name(str(request.checkpoint)),
        "teacher": public_name(str(request.teacher)),
        "text": public_name(request.text),
        "images": described["sha256"],
        "steps": request.steps,
        "batch_size": request.batch_size,
        "learning_rate": request.learning_rate,
        "seed": request.seed,
    }


def _train(
    request: RecoverRequest,
    model: nn.Module,
    teacher: nn.Module,
    images: torch.Tensor,
    state_path: Path,
) -> tuple[dict[str, float], Progress]:
    """Take the steps; the error on held-out images before and after, and what became of them."""
    device = torch.device(request.device)
    model.to(device)
    teacher.to(device).requires_grad_(False)
    apart = held_out(len(images))
    seen, kept = images[:-apart], images[-apart:]
    if len(seen) < request.batch_size:
        raise InputError(
            "There are too few images for a step.",
            where=request.text,
            observed=f"{len(images)}, of which {apart} are held out",
            expected=f"at least {request.batch_size} beside those",
        )

    def error(batch: torch.Tensor) -> torch.Tensor:
        batch = batch.to(device)
        with torch.no_grad():
            targets = teacher(batch)
        return output_error(model(batch), targets)

    state = _state(model, state_path)
    before = _mean(error, kept, request.batch_size)
    progress = state.load_()
    progress.learning_rates.setdefault(str(progress.step), request.learning_rate)
    schedule = request.schedule

    def loss_at(step: int) -> torch.Tensor:
        return error(seen[torch.from_numpy(schedule.windows_at(step, len(seen)))])

    take_steps_(
        state, progress, request.steps, loss_at, schedule.rate_at, _LARGEST_GRADIENT, "step"
    )
    after = _mean(error, kept, request.batch_size)
    if after > before:
        note(f"training made the error larger: {before:.4g} before, {after:.4g} after")
    model.cpu()
    return {"before": before, "after": after}, progress


def _state(model: nn.Module, path: Path) -> TrainingState:
    """Kernels and biases, and behind them scales, with an optimizer of both."""
    parameters = dict(model.requires_grad_().named_parameters())
    scales = {id(parameter) for parameter in scale_parameters(model)}
    ordered = dict(sorted(parameters.items(), key=lambda item: id(item[1]) in scales))
    groups: list[dict[str, Any]] = [
        {"params": [p for p in ordered.values() if id(p) not in scales], "times": 1.0},
        {"params": [p for p in ordered.values() if id(p) in scales], "times": _SCALE_RATE},
    ]
    return TrainingState(path, ordered, torch.optim.AdamW(groups, weight_decay=0.0))


@torch.no_grad()
def _mean(
    error: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, batch_size: int
) -> float:
    """Mean error over images, batch by batch."""
    parts = images.split(batch_size)
    return sum(float(error(part)) * len(part) for part in parts) / len(images)


def _write(
    folder: Path,
    request: RecoverRequest,
    teacher: OpenedNetwork,
    model: PreTrainedModel,
    entries: Entries,
    recovery: dict[str, Any],
) -> None:
    """The checkpoint and its records."""
    save_checkpoint(
        model, teacher.processor, entries, folder, torch.float32, source=request.checkpoint
    )
    recipe = read_record(request.checkpoint, "recipe.json")
    earlier = recipe.get("recovery")
    recovery |= {"earlier": earlier} if earlier else {}
    report = read_record(request.checkpoint, "report.json")
    write_json(folder / "recipe.json", recipe | {"recovery": recovery})
    write_json(folder / "report.json", report | {"weights": weights_record(folder)})
