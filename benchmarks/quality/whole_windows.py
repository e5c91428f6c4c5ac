"""Perplexity of whole windows of text, and KL to what the model said of them without any change."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

_KL_STEP = 8  # on every so many tokens: logits of all would fill memory


class WholeWindows:
    """Windows of text, each read in one call.

    Args:
        tokens: int64 [N, T].
        logits_of: of a window [1, T], as the model says them without any change, [1, T, V].
    """

    def __init__(
        self, tokens: torch.Tensor, logits_of: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self._tokens = tokens
        read = [_read(window, logits_of) for window in tokens]
        self._original = [chances for _, chances in read]
        self.perplexity = float(np.exp(np.mean([loss for loss, _ in read])))

    def measure(self, logits_of: Callable[[torch.Tensor], torch.Tensor]) -> tuple[float, float]:
        """Perplexity, and mean KL to the original, of logits as they are now."""
        losses, divergences = [], []
        for window, before in zip(self._tokens, self._original, strict=True):
            loss, after = _read(window, logits_of)
            losses.append(loss)
            divergences.append(float((before.exp() * (before - after)).sum(-1).mean()))
        return float(np.exp(np.mean(losses))), float(np.mean(divergences))


@torch.no_grad()
def _read(
    window: torch.Tensor, logits_of: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[float, torch.Tensor]:
    """Nats a token of a window [T], and log-probabilities of some tokens, [T / 8, V]."""
    logits = logits_of(window[None])[0].float()
    loss = float(torch.nn.functional.cross_entropy(logits[:-1], window[1:]))
    return loss, logits[::_KL_STEP].log_softmax(-1)
