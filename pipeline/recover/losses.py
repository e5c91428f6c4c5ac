"""What a fine-tuned model is judged by: losses on windows of text, computed here or by workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from pipeline.calibrate.carried_module import ModuleCode, numbers_of
from pipeline.errors import InputError
from pipeline.progress import note
from pipeline.workers.workers import IN_PROCESS, Done, Result, Workers

# Mean loss of a batch of windows, int64 [B, T].
Loss = Callable[[torch.Tensor], torch.Tensor]
# Logits of student and teacher, their logarithms of chances, and what is made of them.
_FLOATS_A_LOGIT = 8
_SMALL_BYTES = 1 << 29


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


def losses_of(model: Any, teacher: Any) -> dict[str, Loss]:
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

    losses: dict[str, Loss] = {"next_token": next_token}
    return losses if teacher is None else losses | {"distillation": distillation}


def measured_losses(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    windows: torch.Tensor,
    batch_size: int,
    workers: Workers = IN_PROCESS,
) -> dict[str, float]:
    """Each loss of `losses_of` on windows that nothing was trained on, nats per token.

    Args:
        model: in evaluation mode.
        teacher: the model to come near to, if there is one.
        windows: int64 [count, T].
        batch_size: the largest batch.
        workers: who computes them, to the same bits.

    Raises:
        InputError: a loss that is not finite; names it.
    """
    batches = windows.split(batch_size)
    found = [one.get() for one in _submitted(model, teacher, batches, workers)]
    values = {
        name: sum(losses[name] * len(b) for losses, b in zip(found, batches, strict=True))
        / len(windows)
        for name in found[0]
    }
    for name, value in values.items():
        if not math.isfinite(value):
            raise InputError(
                "A loss on the held-out windows is not finite.",
                where=name,
                observed=value,
                change="validate the checkpoint, or train with a smaller --learning-rate",
            )
    return values


def _submitted(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: Sequence[torch.Tensor],
    workers: Workers,
) -> list[Result[dict[str, float]]]:
    """Losses of each batch, by workers where they can run both models."""
    models = [model] if teacher is None else [model, teacher]
    codes = [ModuleCode.of(one) for one in models] if workers.at_once else [None]
    if None in codes:
        if workers.at_once:
            note("this process alone measures the losses: its models cannot be made by workers")
        return [Done(_losses_on(model, teacher, batch)) for batch in batches]
    carried = [part for one in zip(codes, map(numbers_of, models), strict=True) for part in one]
    shared = [workers.share(part) for part in carried]
    vocabulary = model.config.get_text_config().vocab_size
    return [
        workers.submit(
            f"held-out windows, batch {place + 1}",
            batch_losses,
            batch,
            *shared,
            needed_bytes=_FLOATS_A_LOGIT * 4 * batch.numel() * vocabulary + _SMALL_BYTES,
        )
        for place, batch in enumerate(batches)
    ]


def batch_losses(
    batch: torch.Tensor,
    code: ModuleCode,
    numbers: dict[str, torch.Tensor],
    teacher_code: ModuleCode | None = None,
    teacher_numbers: dict[str, torch.Tensor] | None = None,
) -> dict[str, float]:
    """Each loss of a model on a batch, int64 [B, T], from the model without its numbers, and those.

    Args:
        batch: of windows.
        code: of the model.
        numbers: its parameters and buffers.
        teacher_code: of the model to come near to, if there is one.
        teacher_numbers: likewise.
    """
    teacher = None
    if teacher_code is not None and teacher_numbers is not None:
        teacher = partial(teacher_code.call, teacher_numbers)
    return _losses_on(partial(code.call, numbers), teacher, batch)


@torch.no_grad()
def _losses_on(model: Any, teacher: Any, batch: torch.Tensor) -> dict[str, float]:
    return {name: loss(batch).item() for name, loss in losses_of(model, teacher).items()}
