"""What recovery minimises; tensors in, a scalar out."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def next_token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of each token given those before it, in nats.

    Args:
        logits: [B, T, V], any float type; computed with in float32.
        tokens: int64 [B, T], T >= 2.
    """
    # The last logits predict a token that is not there.
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def distillation_loss(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Mean KL(teacher || student) over all positions at temperature 1, in nats.

    Args:
        logits: the student's, [B, T, V], any float type; computed with in float32.
        teacher_logits: [B, T, V].
    """
    log_q = logits.flatten(0, 1).float().log_softmax(-1)
    log_p = teacher_logits.flatten(0, 1).float().log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
