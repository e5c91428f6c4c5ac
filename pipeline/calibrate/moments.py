"""Second moments, accumulated batch by batch."""

from __future__ import annotations

import torch


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
