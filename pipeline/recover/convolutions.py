"""Training a network of convolutions under rounding: towards its teacher, or labels."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.artefact import discard, require_same_run, staged_folder, write_json, write_text
from pipeline.calibrate.network import LabelledImages, OpenedNetwork, open_network
from pipeline.checkpoint.card import rounded_card
from pipeline.checkpoint.folder import (
    load_checkpoint,
    read_record,
    save_checkpoint,
    weights_record,
)
from pipeline.errors import InputError, UsageError
from pipeline.int8.convert import Entries, Kernel, WeightRounding, conv_names, folded_kernels
from pipeline.int8.outputs import output_error
from pipeline.int8.training import (
    finish_training_,
    scale_parameters,
    stored_rounding,
    train_rounded_,
)
from pipeline.model.load import load_processor
from pipeline.model.task import adapter_of, task_of_folder
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
        request: its `text` are images, or its `data` images with labels; the teacher is the
            network that was rounded.
        output: the folder to write.
        overwrite: replace it if it exists.
        resume: continue an unfinished run of the same request; the learning rate may differ.

    Returns:
        The `recovery` section of recipe.json.

    Raises:
        PipelineError: bad input, training that diverged, or not enough disk.
    """
    started = time.monotonic()
    _require_meant(request)
    with staged_folder(
        output, overwrite=overwrite, keep=True, resume=resume, inputs=request.inputs_of(output)
    ) as folder:
        work = folder / _WORK
        work.mkdir(exist_ok=True)
        teacher = None if request.teacher is None else open_network(request.teacher)
        model = load_checkpoint(request.checkpoint, dtype=torch.float32)
        entries, rounding = _begin_(model, teacher)
        lesson = _lesson(request, model, teacher, work)
        identity = _identity(request, lesson.images)
        settings = {name: v for name, v in identity.items() if name != "learning_rate"}
        require_same_run(settings, work / "run.json")
        loss, progress = _train(request, model, lesson, work / "state.safetensors")
        finish_training_(model, entries, rounding)
        recovery = {
            "method": "training under rounding (learned step sizes)",
            "objective": lesson.objective,
            "settings": identity,
            "learning_rates": progress.learning_rates,
            "images": lesson.images,
            "held_out_windows": lesson.held_out_images,
            "loss": {lesson.loss: loss},
            "seconds": time.monotonic() - started,
            "provenance": provenance(),
        }
        _write(folder, request, model, entries, recovery)
        write_json(folder / "recovery.json", {"schema": 1, "losses": progress.losses})
        discard(work)
    return recovery


def _require_meant(request: RecoverRequest) -> None:
    """Refuse what cannot be meant of convolutions.

    Raises:
        UsageError: says what.
    """
    if request.teacher is None and request.data is None:
        raise UsageError(
            "Rounded convolutions are trained towards the network that was rounded, or labels.",
            where="--teacher, --data",
            observed="neither",
            change="pass --teacher FOLDER, what compress was given as -m, or labelled images",
        )
    if request.bfloat16:
        raise UsageError(
            "Rounded convolutions are trained in float32, in which their sums are exact.",
            where="--bfloat16",
        )


def _begin_(
    model: PreTrainedModel, teacher: OpenedNetwork | None
) -> tuple[Entries, WeightRounding]:
    """Make a network of codes one that is trained, from its own scales and the teacher's kernels.

    Without a teacher kernels begin as their codes stand for them.

    Raises:
        InputError: the teacher is another network.
    """
    entries: Entries = model.config.quantization_config.modules
    grids, kernels, scales = stored_rounding(model, entries)
    if teacher is not None:
        kernels = _kernels_of(teacher, entries, kernels)
    rounding = WeightRounding(min(entries[name]["bits"] for name in conv_names(entries)))
    # With it, save_pretrained would ignore the state that it is given.
    del model.hf_quantizer
    model.is_quantized = False
    train_rounded_(model, entries, grids, kernels, rounding, scales)
    return entries, rounding


def _kernels_of(
    teacher: OpenedNetwork, entries: Entries, own: dict[str, Kernel]
) -> dict[str, Kernel]:
    """The teacher's kernels, norms folded, which must be of the checkpoint's shapes."""
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
    return kernels


def _identity(request: RecoverRequest, described: dict[str, Any]) -> dict[str, Any]:
    named = {
        "checkpoint": str(request.checkpoint), "teacher": request.teacher, "text": request.text,
        "data": request.data,
    }  # fmt: skip
    return {name: public_name(value) for name, value in named.items() if value} | {
        "images": described["sha256"],
        "steps": request.steps,
        "batch_size": request.batch_size,
        "learning_rate": request.learning_rate,
        "seed": request.seed,
    }


@dataclass(frozen=True)
class _Lesson:
    """What is learned.

    Attributes:
        objective: as recipe.json names it.
        loss: what is measured on held-out images, as recipe.json names it.
        images: what recipe.json says of them.
        held_out_images: how many.
        loss_at: the loss of a step, by its number.
        measure: the loss on held-out images.
    """

    objective: str
    loss: str
    images: dict[str, Any]
    held_out_images: int
    loss_at: Callable[[int], torch.Tensor]
    measure: Callable[[], float]


def _lesson(
    request: RecoverRequest, model: PreTrainedModel, teacher: OpenedNetwork | None, work: Path
) -> _Lesson:
    """Labels, the teacher's outputs, or both, for a model that is put on its device."""
    device = torch.device(request.device)
    model.to(device)
    if teacher is not None:
        teacher.model.to(device).requires_grad_(False)
    if request.data is not None:
        return _labelled(request, model, teacher, work)
    assert teacher is not None, "one of the two is asked for"
    return _distilled(request, model, teacher)


def _distilled(request: RecoverRequest, model: PreTrainedModel, teacher: OpenedNetwork) -> _Lesson:
    """The error of outputs against the teacher's, on images without labels."""
    count = request.windows or min(request.steps * request.batch_size, _MOST_IMAGES)
    batches, described = teacher.read_batches(request.text, count, request.seed)
    images = torch.cat(batches)
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
        batch = batch.to(request.device)
        return output_error(model(batch), _outputs(teacher, batch))

    def loss_at(step: int) -> torch.Tensor:
        return error(seen[torch.from_numpy(request.schedule.windows_at(step, len(seen)))])

    def measure() -> float:
        parts = kept.split(request.batch_size)
        return _mean((len(part), error(part)) for part in parts)

    return _Lesson("distillation", "output_error", described, apart, loss_at, measure)


def _labelled(
    request: RecoverRequest, model: PreTrainedModel, teacher: OpenedNetwork | None, work: Path
) -> _Lesson:
    """The loss of labels, and with a teacher the error against its outputs beside it."""
    open_labelled = adapter_of(task_of_folder(request.checkpoint), "labels")
    labelled: LabelledImages = open_labelled(
        model.config, request.data, batch_size=request.batch_size, seed=request.seed,
        device=request.device, work=work,
    )  # fmt: skip

    def loss_at(step: int) -> torch.Tensor:
        pixels, truth = labelled.read(step)
        outputs = model(pixels)
        loss = labelled.loss(outputs, truth)
        return loss if teacher is None else loss + output_error(outputs, _outputs(teacher, pixels))

    def measure() -> float:
        batches = labelled.held_out()
        return _mean((len(x), labelled.loss(model(x), truth)) for x, truth in batches)

    count = sum(len(pixels) for pixels, _ in labelled.held_out())
    objective = "labels" if teacher is None else "labels and distillation"
    return _Lesson(objective, "label_loss", labelled.described, count, loss_at, measure)


def _outputs(teacher: OpenedNetwork, pixels: torch.Tensor) -> Any:
    with torch.no_grad():
        return teacher.model(pixels)


def _train(
    request: RecoverRequest, model: nn.Module, lesson: _Lesson, state_path: Path
) -> tuple[dict[str, float], Progress]:
    """Take the steps; the loss on held-out images before and after, and what became of them."""
    state = _state(model, state_path)
    with torch.no_grad():
        before = lesson.measure()
    progress = state.load_()
    progress.learning_rates.setdefault(str(progress.step), request.learning_rate)
    take_steps_(
        state, progress, request.steps, lesson.loss_at, request.schedule.rate_at,
        _LARGEST_GRADIENT, "step",
    )  # fmt: skip
    with torch.no_grad():
        after = lesson.measure()
    if after > before:
        note(f"training made the loss larger: {before:.4g} before, {after:.4g} after")
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


def _mean(losses: Iterable[tuple[int, torch.Tensor]]) -> float:
    """Mean over images of the mean losses of batches, each with how many images it has."""
    counts, values = zip(*((count, float(loss)) for count, loss in losses), strict=True)
    return sum(c * v for c, v in zip(counts, values, strict=True)) / sum(counts)


def _write(
    folder: Path,
    request: RecoverRequest,
    model: PreTrainedModel,
    entries: Entries,
    recovery: dict[str, Any],
) -> None:
    """The checkpoint and its records."""
    processor = load_processor(str(request.checkpoint))
    save_checkpoint(model, processor, entries, folder, torch.float32, source=request.checkpoint)
    recipe = read_record(request.checkpoint, "recipe.json")
    earlier = recipe.get("recovery")
    recovery |= {"earlier": earlier} if earlier else {}
    report = read_record(request.checkpoint, "report.json")
    recipe |= {"recovery": recovery}
    report |= {"weights": weights_record(folder)}
    write_json(folder / "recipe.json", recipe)
    write_json(folder / "report.json", report)
    write_text(folder / "README.md", rounded_card(recipe, report))
