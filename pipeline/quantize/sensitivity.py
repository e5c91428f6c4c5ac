"""What errors of an output are worth, as a matrix that need not be held whole."""

from __future__ import annotations

from typing import Protocol

import torch


class Sensitivity(Protocol):
    """G of what a matrix returns: a tensor, float [m, m], or what makes its rows when asked."""

    def __len__(self) -> int:
        """Rows, m."""
        ...

    def __getitem__(self, rows: slice, /) -> torch.Tensor:
        """Some rows, float [k, m]."""
        ...

    def double(self) -> torch.Tensor:
        """All of it, float64 [m, m]."""
        ...
