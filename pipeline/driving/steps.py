"""The steps of one stage, with their state on disk.

What a step reads and what chance does to it are functions of seed, stage and step, so that a run
that was interrupted ends, on the CPU with as many threads, in the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.driving.augment import batch_of
from pipeline.driving.loss import Batch, driving_loss
from pipeline.driving.network import QyolopForDrivingPerception
from pipeline.driving.recipe import Stage, TrainRequest, places_at
from pipeline.driving.sample import DrivingSet
from pipeline.training_state import Progress, TrainingState, take_steps_

_LARGEST_GRADIENT = 10.0
_WEIGHT_DECAY = 5e-4
_AVERAGED = 0.998  # of the running mean of weights that is kept


def train_stage_(
    model: QyolopForDrivingPerception,
    stage: Stage,
    sets: list[DrivingSet],
    request: TrainRequest,
    path: Path,
) -> Progress:
    """Take the steps of a stage, and give the model the running mean of its weights.

    Args:
        model: changed in place.
        stage: what is read, and how far a step goes.
        sets: those that the stage names.
        request: batch size, steps, seed.
        path: where the state is kept from time to time.

    Raises:
        InputError: an image that cannot be read, or training that diverged.
    """
    device = torch.device(request.device)
    model.to(device).train()
    mean = {n: t.detach().clone() for n, t in model.state_dict().items() if t.is_floating_point()}
    # A step's forward pass changes the statistics of norms: these are as they were before it.
    buffers = dict(model.named_buffers())
    held = {f"buffer/{name}": tensor.clone() for name, tensor in buffers.items()}
    averaged = {f"mean/{name}": tensor for name, tensor in mean.items()}
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(_groups(parameters), weight_decay=0.0)
    state = TrainingState(path, _ordered(parameters), optimizer, held | averaged)
    progress, steps = state.load_(), request.steps_of(stage)
    for name, tensor in buffers.items():
        tensor.copy_(held[f"buffer/{name}"])
    progress.learning_rates.setdefault(str(progress.step), request.learning_rate)

    def loss_at(step: int) -> torch.Tensor:
        batch = drawn_batch(stage, sets, request, step)
        for name, tensor in buffers.items():
            held[f"buffer/{name}"].copy_(tensor)
        return _total_loss(model, batch, request)

    with _same_bits():
        take_steps_(
            state,
            progress,
            steps,
            loss_at,
            lambda step: request.learning_rate * stage.rate_at(step, steps),
            _LARGEST_GRADIENT,
            f"{stage.name}, step",
            clipped=parameters.values(),
            after=lambda step: _average_(mean, model, step),
        )
    model.load_state_dict(mean, strict=False)
    model.eval()
    return progress


def _groups(parameters: dict[str, nn.Parameter]) -> list[dict[str, object]]:
    """Convolutions decay, norms and biases do not."""
    decayed = [p for p in parameters.values() if p.ndim > 1]
    others = [p for p in parameters.values() if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": _WEIGHT_DECAY}, {"params": others}]


def _ordered(parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """As the optimizer numbers them."""
    return dict(sorted(parameters.items(), key=lambda item: item[1].ndim <= 1))


def drawn_batch(stage: Stage, sets: list[DrivingSet], request: TrainRequest, step: int) -> Batch:
    """What a step reads, changed by chance that is its own.

    Args:
        stage: its augmentation is asked for, and its name, which is part of the chance.
        sets: that take turns.
        request: size, batch size, seed and device.
        step: counted from 0.
    """
    words = [request.seed, *stage.name.encode(), step]
    places = places_at(request.seed, step, request.batch_size, [len(data) for data in sets])
    samples = []
    for row, (which, place) in enumerate(places):
        rng = np.random.default_rng([*words, row])
        samples.append(stage.augmentation.drawn(sets[which], place, request.size, rng))
    return batch_of(samples).to(request.device)


def _total_loss(
    model: QyolopForDrivingPerception, batch: Batch, request: TrainRequest
) -> torch.Tensor:
    with torch.autocast(torch.device(request.device).type, torch.bfloat16, request.bfloat16):
        maps = model(pixel_values=batch.pixels)
    return torch.stack(list(driving_loss(maps, batch, model.config.anchors).values())).sum()


@torch.no_grad()
def _average_(mean: dict[str, torch.Tensor], model: nn.Module, step: int) -> None:
    """Move the running mean of weights and of norms' statistics; it forgets its beginning fast."""
    kept = min(_AVERAGED, (step + 1) / (step + 10))
    now = model.state_dict()
    for name, tensor in mean.items():
        tensor.lerp_(now[name], 1 - kept)


@contextmanager
def _same_bits() -> Iterator[None]:
    """Sums in one order, with whatever number of threads."""
    before = torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False  # it would cost time, and changes no bit
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = filled
