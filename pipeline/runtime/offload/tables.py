"""Embedding and head, which are kept as published and widened as they are used."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

# Numbers of the head's matrix that are widened at once.
_HEAD_NUMBERS = 1 << 20


def look_up_in(embedding: Any, table: torch.Tensor, like: torch.Tensor) -> None:
    """Let an embedding have the rows that it is asked for, and no others, while it looks them up.

    Args:
        embedding: a module whose calls have int64 ids in the CPU's memory.
        table: [V, H], as published, in the CPU's memory.
        like: of the type and on the device that the model computes with.
    """
    embedding.padding_idx = None  # of gradients, and the number of a row it is not given
    embedding.register_forward_pre_hook(partial(_widen_rows, table, like))


def _widen_rows(
    table: torch.Tensor, like: torch.Tensor, module: nn.Module, given: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Give the embedding the rows, and instead of ids their numbers among these."""
    rows, places = torch.unique(given[0], return_inverse=True)
    module._parameters["weight"] = nn.Parameter(table[rows].to(like), requires_grad=False)
    return (places.to(like.device), *given[1:])


class HeadByParts:
    """The head's product, for some words after the others, which alone are widened.

    Args:
        table: [V, H], as published.
        bias: [V], or None.
    """

    def __init__(self, table: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._table, self._bias = table, bias
        words, width = table.shape
        # One piece of memory for all parts: new ones would be paid for by page faults.
        self._part = torch.empty((min(words, max(1, _HEAD_NUMBERS // width)), width))

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits, float32 [..., V], of float32 [..., H]."""
        words, step = len(self._table), len(self._part)
        logits = hidden.new_empty((*hidden.shape[:-1], words))
        for start in range(0, words, step):
            stop = min(start + step, words)
            part = self._part[: stop - start].copy_(self._table[start:stop])
            own = None if self._bias is None else self._bias[start:stop]
            logits[..., start:stop] = nn.functional.linear(hidden, part, own)
        return logits
