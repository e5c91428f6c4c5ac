"""Second moments, accumulated batch by batch."""

from __future__ import annotations

import torch

from pipeline.calibrate.precision import has_bfloat16_units

LARGEST_NORM = 10.0


class SecondMoment:
    """Running S = sum over tokens of x x^T, for one input of width n.

    Products are taken in float32, where the matrix units are, and summed in float64, so that the
    number of batches does not add to the error.
    """

    def __init__(self, width: int) -> None:
        self.total = torch.zeros(width, width, dtype=torch.float64)
        self.tokens = 0

    def add_(self, inputs: torch.Tensor) -> None:
        """Add a batch of inputs, float [..., n].

        Raises:
            ValueError: NaN or infinite values.
        """
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        if not torch.isfinite(rows.sum()) and not torch.isfinite(rows).all():
            raise ValueError("NaN or infinite activations")
        self.total += rows.T @ rows
        self.tokens += rows.shape[0]

    def mean(self) -> torch.Tensor:
        """S / tokens, float64 [n, n].

        Raises:
            ValueError: no token was added.
        """
        if self.tokens == 0:
            raise ValueError("no tokens were accumulated")
        return self.total / self.tokens


class OutputMoment:
    """Running G = sum over tokens of g g^T, for the gradient by one output of height m.

    A few tokens have gradients hundreds of times larger than the rest and would decide alone: a
    gradient longer than LARGEST_NORM times the root mean square of its batch is cut to that length.
    G is only ever used shrunk, so that products in bfloat16 are accurate enough.
    """

    def __init__(self, height: int) -> None:
        self.total = torch.zeros(height, height, dtype=torch.float32)
        self.tokens = 0

    @torch.no_grad()
    def add_(self, gradients: torch.Tensor) -> None:
        """Add a batch of gradients, float [..., m].

        Raises:
            ValueError: NaN or infinite values.
        """
        rows = gradients.detach().reshape(-1, gradients.shape[-1]).float()
        squares = rows.square().sum(dim=1)
        if not torch.isfinite(squares).all():
            raise ValueError("NaN or infinite gradients")
        limit = LARGEST_NORM * squares.mean().sqrt()
        rows = rows * (limit / squares.sqrt().clamp_min(1e-30)).clamp_max(1)[:, None]
        if has_bfloat16_units():
            rows = rows.bfloat16()
        self.total += rows.T @ rows
        self.tokens += rows.shape[0]

    def mean(self) -> torch.Tensor:
        """G / tokens, float32 [m, m].

        Raises:
            ValueError: no token was added.
        """
        if self.tokens == 0:
            raise ValueError("no tokens were accumulated")
        return self.total / self.tokens
