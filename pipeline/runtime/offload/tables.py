"""Embedding and head, which are kept as published and widened as they are used."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# Numbers of the head's matrix that are widened at once.
_HEAD_NUMBERS = 4 << 20


def widen_rows(table: torch.Tensor, module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Before an embedding looks rows up: give it those alone, in float32, and their numbers."""
    rows, places = torch.unique(given[0], return_inverse=True)
    module._parameters["weight"] = nn.Parameter(table[rows].float(), requires_grad=False)
    return (places, *given[1:])


def head_by_parts(
    table: torch.Tensor, bias: torch.Tensor | None, hidden: torch.Tensor
) -> torch.Tensor:
    """The head's product, for some words after the others, which alone are widened."""
    words, width = table.shape
    step = max(1, _HEAD_NUMBERS // width)
    logits = hidden.new_empty((*hidden.shape[:-1], words))
    for start in range(0, words, step):
        part = table[start : start + step].float()
        own = None if bias is None else bias[start : start + step]
        logits[..., start : start + step] = nn.functional.linear(hidden, part, own)
    return logits
