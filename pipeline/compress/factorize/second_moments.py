"""Second moments as the geometry that errors are measured in, of the widest matrices by parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from pipeline.calibrate.moments import Balanced
from pipeline.quantize.sensitivity import Sensitivity
from pipeline.quantize.slices import slices
from pipeline.quantize.triangular import cholesky_

# Second moments that are held whole, and those of which rows are made when they are asked for.
Moment = torch.Tensor | Balanced
# Of the trace.
_RIDGE = 1e-9
# Of the widest matrices, what is held in float64 besides the sums.
ROWS_AT_ONCE = 2048


def row_blocks(rows: int) -> Iterator[slice]:
    """Slices that cover so many rows, `ROWS_AT_ONCE` each."""
    return slices(rows, ROWS_AT_ONCE)


def is_zero(moment: torch.Tensor) -> bool:
    """Whether a second moment [n, n] is of inputs, or of gradients, that are all zero."""
    return not moment.diagonal().any()


def regular(moment: torch.Tensor) -> torch.Tensor:
    """A second moment [n, n] to measure errors in: the identity where none counts."""
    return torch.eye(len(moment), dtype=torch.float64) if is_zero(moment) else moment


def shrunk(moment: torch.Tensor, share: float) -> torch.Tensor:
    """A second moment moved towards a multiple of the identity that has its trace.

    Few tokens estimate a wide moment badly: its large eigenvalues come out too large and its small
    ones too small. (1 - share) S + share tr(S)/n I takes part of that back (Ledoit and Wolf, 2004).

    Args:
        moment: S, float [n, n].
        share: in [0, 1].

    Returns:
        float64 [n, n].
    """
    level = share * float(moment.diagonal().double().mean())
    return Shrunk(moment, share, level).double()


@dataclass(frozen=True)
class Shrunk:
    """(1 - share) G + level I, of which nothing but the rows that are asked for is ever held.

    Of the widest outputs a float64 matrix takes gigabytes.

    Attributes:
        moment: G, float [m, m].
        share: in [0, 1].
        level: what is added to the diagonal (see `shrunk`).
    """

    moment: torch.Tensor
    share: float
    level: float

    def __len__(self) -> int:
        return len(self.moment)

    def __getitem__(self, rows: slice) -> torch.Tensor:
        found = self.moment[rows].to(torch.float64, copy=True).mul_(1 - self.share)
        found.diagonal(rows.start or 0).add_(self.level)
        return found

    def double(self) -> torch.Tensor:
        """All of it, float64 [m, m]."""
        return self[0 : len(self)]


def cholesky(moment: torch.Tensor, relative_ridge: float = _RIDGE) -> torch.Tensor:
    """Lower-triangular C with C C^T = S, float64 [n, n], up to a ridge that lets a singular S pass.

    The ridge is a fraction of the trace, raised tenfold until the factorisation exists. Beside S,
    float [n, n], nothing is held but C.

    Raises:
        ValueError: the moment is not finite, or is zero.
    """
    trace = float(moment.diagonal().double().sum())
    if not is_finite(moment):
        raise ValueError("the second moment holds NaN or infinite values")
    if trace <= 0:
        raise ValueError("the second moment is zero: the calibration text never reaches this layer")
    while True:
        ridged = moment.to(torch.float64, copy=True)
        ridged.diagonal().add_(relative_ridge * trace)
        root = cholesky_(ridged)
        if root is not None:
            return root
        relative_ridge *= 10


def times_moment(matrix: torch.Tensor, moment: Moment) -> torch.Tensor:
    """M S, float64 [k, n], by a block of rows of S, float [n, n], at a time."""
    found = torch.zeros(matrix.shape, dtype=torch.float64)
    for rows in row_blocks(len(moment)):
        found.addmm_(matrix[:, rows], moment[rows].double())
    return found


def weighted_gram(weight: torch.Tensor, sensitivities: Sequence[Sensitivity]) -> torch.Tensor:
    """W^T G W with block-diagonal G, or W^T W without one; float64 [n, n]."""
    if not sensitivities:
        weight = weight.double()
        return weight.T @ weight
    found = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
    parts = weight.split([len(block) for block in sensitivities])
    for part, block in zip(parts, sensitivities, strict=True):
        for rows in row_blocks(len(part)):
            worth = block[rows].double()
            weighted = torch.zeros(len(worth), part.shape[1], dtype=torch.float64)
            for others in row_blocks(len(part)):
                weighted += worth[:, others] @ part[others].double()
            found += part[rows].double().T @ weighted
    return found


def is_finite(matrix: torch.Tensor) -> bool:
    """Whether no entry is NaN or infinite, without a mask as large as the matrix."""
    return bool(torch.isfinite(matrix.sum(dtype=torch.float64)))
