"""One group of weights and its second moment into factors: the whole of SkipCat for a group."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pipeline.compress.rank import Form
from pipeline.compress.skip import skip_block
from pipeline.compress.truncate import whitened_spectrum


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


def factor_group(stack: torch.Tensor, moment: torch.Tensor, form: Form, rank: int) -> Factors:
    """Factor a stack of matrices that share their input (Cat), or a single matrix.

    Args:
        stack: the members' weights, one above the other, float [m, n].
        moment: S = E[x x^T] of their input, float64 [n, n].
        form: "low_rank" or "skip".
        rank: r, at most min(m, n).

    Raises:
        ValueError: shapes that do not fit, or a moment that is not finite or zero.
    """
    spectrum = whitened_spectrum(stack, moment)
    b, a = spectrum.factors(rank)
    error = spectrum.relative_tail(rank)
    if form == "low_rank":
        return Factors(form, rank, b, a, None, error)
    skip = skip_block(b, a)
    return Factors(form, rank, skip.up, skip.interpolation, skip.permutation, error)
