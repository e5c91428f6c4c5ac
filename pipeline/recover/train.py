"""What is learned, in which steps, and the loop with its state on disk.

Student q and teacher p, over windows x of T tokens, in nats per token:

    next token    -mean log q(x_t | x_<t)
    distillation   mean KL(p(. | x_<=t) || q(. | x_<=t))

Which windows a step reads and how far it goes are functions of the step alone. Nothing random is
carried from one step to the next, so a resumed run needs no state of a sampler or of a scheduler
to take the same steps as one that was not interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from pipeline.calibrate.text import TokenBatch
from pipeline.errors import InputError
from pipeline.model.load import LoadedModel
from pipeline.recover.adapters import attach, merge_
from pipeline.recover.request import Recoverable, RecoverRequest, Schedule, held_out
from pipeline.training_state import Progress, TrainingState, take_steps_

# Mean loss of a batch of windows, int64 [B, T].
_Loss = Callable[[torch.Tensor], torch.Tensor]
_LARGEST_GRADIENT = 1.0


def fine_tune(
    request: RecoverRequest,
    subject: Recoverable,
    student: LoadedModel,
    teacher: LoadedModel | None,
    text: TokenBatch,
    work: Path,
) -> tuple[PreTrainedModel, dict[str, dict[str, float]], Progress]:
    """Train, merge, and measure before and after; the model as it will be stored."""
    device = torch.device(request.device)
    guide = None if teacher is None else teacher.model.to(device)
    tokens = text.tokens.to(device)
    measured = tokens[-held_out(len(tokens)) :]
    adapted = attach(student.model.to(device), request.lora_rank, request.lora_alpha, request.seed)
    losses = _losses_of(adapted, guide)
    objective = list(losses.values())[-1]

    def training_loss(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=request.bfloat16):
            return objective(batch)

    before = _measure(losses, measured, request.batch_size)
    progress = _train_(
        adapted,
        training_loss,
        tokens[: -len(measured)],
        request.schedule,
        work / "state.safetensors",
    )
    model = merge_(adapted, subject.dtype)
    after = _measure(_losses_of(model, guide), measured, request.batch_size)
    pairs = {name: {"before": before[name], "after": after[name]} for name in losses}
    return model.cpu(), pairs, progress


def _measure(losses: dict[str, _Loss], windows: torch.Tensor, batch_size: int) -> dict[str, float]:
    """Each loss on the held-out windows, nats per token."""
    values = {name: _mean_loss(loss, windows, batch_size) for name, loss in losses.items()}
    for name, value in values.items():
        if not math.isfinite(value):
            raise InputError(
                "A loss on the held-out windows is not finite.",
                where=name,
                observed=value,
                change="validate the checkpoint, or train with a smaller --learning-rate",
            )
    return values


def _next_token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of each token given those before it, in nats.

    Args:
        logits: [B, T, V], any float type; computed with in float32.
        tokens: int64 [B, T], T >= 2.
    """
    # The last logits predict a token that is not there.
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def _distillation_loss(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Mean KL(teacher || student) over all positions at temperature 1, in nats.

    Args:
        logits: the student's, [B, T, V], any float type; computed with in float32.
        teacher_logits: [B, T, V].
    """
    log_q = logits.flatten(0, 1).float().log_softmax(-1)
    log_p = teacher_logits.flatten(0, 1).float().log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def _losses_of(model: Any, teacher: PreTrainedModel | None) -> dict[str, _Loss]:
    """The losses of a model, by name; the last is the one to train on.

    Args:
        model: gives logits for int64 [B, T].
        teacher: the model to come near to, if there is one.
    """

    def next_token(batch: torch.Tensor) -> torch.Tensor:
        return _next_token_loss(model(batch, use_cache=False).logits, batch)

    def distillation(batch: torch.Tensor) -> torch.Tensor:
        assert teacher is not None
        with torch.no_grad():
            target = teacher(batch, use_cache=False).logits
        return _distillation_loss(model(batch, use_cache=False).logits, target)

    losses: dict[str, _Loss] = {"next_token": next_token}
    return losses if teacher is None else losses | {"distillation": distillation}


@torch.no_grad()
def _mean_loss(loss_of: _Loss, windows: torch.Tensor, batch_size: int) -> float:
    """Mean over windows of a loss, float64 on the way.

    Args:
        loss_of: mean loss of a batch, int64 [B, T].
        windows: int64 [count, T].
        batch_size: the largest B.
    """
    total = sum(loss_of(batch).item() * len(batch) for batch in windows.split(batch_size))
    return total / len(windows)


def _train_(
    model: nn.Module, loss_of: _Loss, windows: torch.Tensor, schedule: Schedule, path: Path
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
