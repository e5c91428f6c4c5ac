"""KL between what a model says and what it said before it was changed: tensors in, numbers out."""

from __future__ import annotations

import torch


def log_chances(logits: torch.Tensor) -> torch.Tensor:
    """Logarithms of next-token chances, float32 [..., V]."""
    return logits.float().log_softmax(-1)


def divergence(before: torch.Tensor, logits: torch.Tensor) -> float:
    """Mean KL(before || now), nats a token.

    Args:
        before: what `log_chances` gave, [..., V]; in float16, perhaps, where several are held.
        logits: of the same tokens now, [..., V].
    """
    wanted, now = before.float(), log_chances(logits)
    return float((wanted.exp() * (wanted - now)).sum(-1).mean())
