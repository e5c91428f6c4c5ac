"""A product B A in the form that is stored, with the error it makes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.compress.factorize.block_skip import skip_block
from pipeline.compress.forms import Form


@dataclass(frozen=True)
class Factors:
    """What a stack of m x n is replaced by.

    Attributes:
        form: "low_rank" or "skip".
        rank: r.
        up: float64 [m, r], rows in the order of the stack.
        down: float64; A [r, n] for low_rank, A' [r, n - r] for skip.
        permutation: int64 [n] for skip, else None.
        relative_error: E |W x - W_r x|^2 / E |W x|^2 over the calibration tokens.
    """

    form: Form
    rank: int
    up: torch.Tensor
    down: torch.Tensor
    permutation: torch.Tensor | None
    relative_error: float


def stored_factors(
    b: torch.Tensor, a: torch.Tensor, stack: torch.Tensor, moment: torch.Tensor, form: Form
) -> Factors:
    """Bring a product B A that stands for `stack` into the form that is stored.

    Args:
        b: B, float64 [m, r].
        a: A, float64 [r, n].
        stack: what it stands for, float [m, n].
        moment: S of the input, float64 [n, n]; the error is measured in it.
        form: "low_rank" or "skip".
    """
    error = relative_output_error(stack.double(), b @ a, moment)
    if form == "low_rank":
        return Factors(form, a.shape[0], b, a, None, error)
    skip = skip_block(b, a)
    return Factors(form, a.shape[0], skip.up, skip.interpolation, skip.permutation, error)


def relative_output_error(
    weight: torch.Tensor, approximation: torch.Tensor, moment: torch.Tensor
) -> float:
    """E |W x - V x|^2 / E |W x|^2 for float64 W and V [m, n] and S = E[x x^T] [n, n]."""
    lost = weight - approximation
    whole = float((weight @ moment * weight).sum())
    return max(float((lost @ moment * lost).sum()), 0.0) / whole if whole > 0 else 0.0
