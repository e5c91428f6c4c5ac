"""What is learned, in which steps, and the loop with its state on disk.

Student q and teacher p, over windows x of T tokens, in nats per token:

    next token    -mean log q(x_t | x_<t)
    distillation   mean KL(p(. | x_<=t) || q(. | x_<=t))

Which windows a step reads and how far it goes are functions of the step alone. Nothing random is
carried from one step to the next, so a resumed run needs no state of a sampler or of a scheduler
to take the same steps as one that was not interrupted.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.calibrate.text import TokenBatch
from pipeline.model.load import LoadedModel
from pipeline.recover.adapters import attach, merge_
from pipeline.recover.losses import Loss, losses_of, measured_losses
from pipeline.recover.request import Recoverable, RecoverRequest, Schedule, held_out
from pipeline.training_state import Progress, TrainingState, take_steps_
from pipeline.workers.workers import IN_PROCESS, Workers

_LARGEST_GRADIENT = 1.0


def fine_tune(
    request: RecoverRequest,
    subject: Recoverable,
    student: LoadedModel,
    teacher: LoadedModel | None,
    text: TokenBatch,
    work: Path,
    workers: Workers = IN_PROCESS,
) -> tuple[PreTrainedModel, dict[str, dict[str, float]], Progress]:
    """Train, merge, and measure before and after; the model as it will be stored."""
    device = torch.device(request.device)
    guide = None if teacher is None else teacher.model.to(device)
    tokens = text.tokens.to(device)
    measured = tokens[-held_out(len(tokens)) :]

    def measure(model: PreTrainedModel) -> dict[str, float]:
        return measured_losses(model, guide, measured, request.batch_size, workers)

    before = measure(student.model.to(device))
    adapted = attach(student.model, request.lora_rank, request.lora_alpha, request.seed)
    losses = losses_of(adapted, guide)
    objective = list(losses.values())[-1]

    def training_loss(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=request.bfloat16):
            return objective(batch)

    progress = _train_(
        adapted,
        training_loss,
        tokens[: -len(measured)],
        request.schedule,
        work / "state.safetensors",
    )
    model = merge_(adapted, subject.dtype)
    after = measure(model)
    pairs = {name: {"before": before[name], "after": after[name]} for name in losses}
    return model.cpu(), pairs, progress


def _train_(
    model: nn.Module, loss_of: Loss, windows: torch.Tensor, schedule: Schedule, path: Path
) -> Progress:
    """Take the steps of a schedule that an earlier run has not taken yet.

    Nothing random is left in a step (no dropout, order of the windows from the seed), so that on
    the CPU, with as many threads, a resumed run ends in the same bits as an uninterrupted one.

    Args:
        model: changed in place, in those of its parameters that require a gradient.
        loss_of: the loss of a batch of windows, int64 [B, T], under the model.
        windows: int64 [count, T].
        schedule: which windows each step reads, and how far it goes.
        path: where the state is kept from time to time.

    Raises:
        InputError: a loss or gradient that is not finite; the state on disk is from before it.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=0.0)
    state = TrainingState(path, parameters, optimizer)
    progress = state.load_()
    if schedule.learning_rate not in list(progress.learning_rates.values())[-1:]:
        progress.learning_rates[str(progress.step)] = schedule.learning_rate

    def loss_at(step: int) -> torch.Tensor:
        return loss_of(windows[torch.from_numpy(schedule.windows_at(step, len(windows)))])

    take_steps_(
        state, progress, schedule.steps, loss_at, schedule.rate_at, _LARGEST_GRADIENT,
        "recover, step",
    )  # fmt: skip
    return progress
