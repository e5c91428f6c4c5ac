"""A product B A in the form that is stored, quantised or not, with the error it makes.

Block skipping spends the r x r freedom of a product B A on an identity block. With A P = [A1 A2],
A' = A1^-1 A2 and B' = B A1: B A x = B' (x1 + A' x2) exactly, [x1; x2] = P^T x. It stores
r (m + n - r) numbers instead of r (m + n). A1 is found by strong rank-revealing QR: r columns of A
in which every other column is written with |a| <= 2.

Gu and Eisenstat 1996. For A of full row rank r the criterion is max |A1^-1 A2| <= f: as long as an
entry p of A1^-1 A2 exceeds f, swapping its two columns multiplies |det A1| by |p| > f, so the loop
ends. LU with partial pivoting, which runs at the speed of the matrix units, gives a start from
which few swaps remain; column-pivoted QR leaves fewer, and runs at the speed of memory.

Quantised, each factor is rounded with what it multiplies in view, the second refitted between.
y = B z, z = T x; for block skipping T = [I A'] P^T, else T = A. An error E in A costs
tr(B^T G B E S_2 E^T), S_2 the moment of what A multiplies; once A is rounded to Q(A), z and its
moment S_z = T S T^T are known, and B becomes the least-squares answer to the target W on that z,

    B* = W S T^T S_z^-1,

before it is rounded in the geometry of S_z and G: it makes up for the errors of A.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from pipeline.compress.factorize.second_moments import row_blocks, times_moment, weighted_gram
from pipeline.quantize.formats import Format
from pipeline.quantize.gptq import gptq
from pipeline.quantize.groupwise import Blocks, quantize_blocks
from pipeline.quantize.sensitivity import Sensitivity

Form = Literal["dense", "low_rank", "skip"]
_Formats = tuple[Format | None, Format | None]
# Of the strong pivots.
_BOUND = 2.0
# The loop aims a little below the bound, so that recomputing A' afterwards cannot cross it.
_SAFETY = 1.0 - 1e-6
_RELATIVE_RIDGE = 1e-6


@dataclass(frozen=True)
class Factors:
    """What a stack of m x n is replaced by.

    Attributes:
        form: "low_rank" or "skip".
        rank: r.
        up: float64 [m, r], rows in the order of the stack.
        down: float64; A [r, n] for low_rank, A' [r, n - r] for skip.
        permutation: int64 [n] for skip, x1 = x[permutation[:r]]; else None.
        relative_error: E |W x - W_r x|^2 / E |W x|^2 over the calibration tokens.
    """

    form: Form
    rank: int
    up: torch.Tensor
    down: torch.Tensor
    permutation: torch.Tensor | None
    relative_error: float

    @classmethod
    def stored_(
        cls, b: torch.Tensor, a: torch.Tensor, stack: torch.Tensor, moment: torch.Tensor, form: Form
    ) -> Factors:
        """A product B A that stands for `stack`, in the form that is stored.

        Args:
            b: B, float64 [m, r]; overwritten, since the widest take gigabytes.
            a: A, float64 [r, n].
            stack: what it stands for, float [m, n].
            moment: S of the input, float [n, n]; the error is measured in it.
            form: "low_rank" or "skip".
        """
        error = relative_output_error(stack, lambda rows: b[rows] @ a, moment)
        if form == "low_rank":
            return cls(form, a.shape[0], b, a, None, error)
        return replace(_skip_block_(b, a), relative_error=error)

    @classmethod
    def estimated(cls, b: torch.Tensor, a: torch.Tensor, form: Form) -> Factors:
        """The same without swaps or error: good enough to estimate what rounding will cost."""
        rank = a.shape[0]
        if form == "low_rank":
            return cls(form, rank, b, a, None, 0.0)
        permutation, interpolation = _quick_pivots(a)
        return cls(form, rank, b @ a[:, permutation[:rank]], interpolation, permutation, 0.0)

    def latent_map(self) -> torch.Tensor:
        """T with z = T x, float64 [r, n]."""
        if self.permutation is None:
            return self.down
        identity = torch.eye(self.rank, dtype=torch.float64)
        return torch.cat([identity, self.down], dim=1)[:, torch.argsort(self.permutation)]

    def moment_of_down(self, geometry: torch.Tensor) -> torch.Tensor:
        """S of what `down` multiplies: x, or the part x2 that is no pivot; float64."""
        if self.permutation is None:
            return geometry
        others = self.permutation[self.rank :]
        return geometry[others[:, None], others]

    def product(self, rows: slice = slice(None)) -> torch.Tensor:
        """What is multiplied with x, float64 [m, n], or some rows of it."""
        return self.up[rows] @ self.latent_map()


def relative_output_error(
    weight: torch.Tensor, approximation: Callable[[slice], torch.Tensor], moment: torch.Tensor
) -> float:
    """E |W x - V x|^2 / E |W x|^2 for W and V [m, n] and S = E[x x^T], float [n, n].

    Args:
        weight: W, float.
        approximation: gives some rows of V, float64.
        moment: S.
    """
    error = whole = 0.0
    for rows in row_blocks(len(weight)):
        part = weight[rows].double()
        lost = part - approximation(rows)
        whole += float(times_moment(part, moment).mul_(part).sum())
        error += float(times_moment(lost, moment).mul_(lost).sum())
    return max(error, 0.0) / whole if whole > 0 else 0.0


def _strong_pivots(a: torch.Tensor, bound: float = _BOUND) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose pivot columns of A, float64 [r, n], r <= n, and write the others in them.

    A may lack full row rank: the pivots are then those of a larger row space, and A2 = A1 A' still
    holds.

    Returns:
        permutation: int64 [n], the r pivot columns first.
        interpolation: A' = A1^-1 A2, float64 [r, n - r], max |A'| <= bound.

    Raises:
        ValueError: a bound of 1 or less, or more rows than columns.
    """
    rank, columns = a.shape
    if bound <= 1:
        raise ValueError(f"bound {bound} must be larger than 1, or the swaps need not end")
    if rank > columns:
        raise ValueError(f"A {tuple(a.shape)} has more rows than columns")
    # A' does not change when A is multiplied from the left, so work on an orthonormal row basis:
    # its conditioning, not that of A, then limits the accuracy.
    basis = torch.linalg.qr(a.T.double())[0].T
    permutation, interpolation = _quick_pivots(basis)
    while interpolation.numel() and float(interpolation.abs().max()) > bound:
        table = interpolation.contiguous().numpy()
        swapped = _swap_until_bounded_(table, permutation.numpy(), bound * _SAFETY)
        permutation = torch.from_numpy(swapped)
        pivots, others = permutation[:rank], permutation[rank:]
        del interpolation, table
        interpolation = torch.linalg.solve(basis[:, pivots], basis[:, others])
    return permutation, interpolation.contiguous()


def _quick_pivots(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by LU with partial pivoting alone: without the bound.

    From P L U = A^T: its rows in the order of P, and A' = L1^-T L2^T. Good enough for what is
    estimated from the factors, not for what is stored.
    """
    rank = a.shape[0]
    factored, swaps = torch.linalg.lu_factor(a.T.double())
    order = torch.arange(a.shape[1])
    for row, other in enumerate((swaps - 1).tolist()):
        order[[row, other]] = order[[other, row]]
    triangle = factored[:rank].tril(-1).T
    interpolation = torch.linalg.solve_triangular(
        triangle, factored[rank:].T, upper=True, unitriangular=True
    )
    return order, interpolation


def _swap_until_bounded_(table: np.ndarray, permutation: np.ndarray, bound: float) -> np.ndarray:
    """Exchange columns until no entry of `table` (changed in place) exceeds `bound`."""
    permutation, changed = permutation.copy(), torch.from_numpy(table)
    rank = table.shape[0]
    while True:
        # Without a copy of the absolute values, or of what is subtracted.
        extremes = [np.unravel_index(at, table.shape) for at in (table.argmax(), table.argmin())]
        row, column = max(extremes, key=lambda at: abs(table[at]))
        entry = table[row, column]
        if abs(entry) <= bound:
            return permutation
        pivot_row = table[row] / entry
        pivot_column = table[:, column].copy()
        changed.addr_(torch.from_numpy(pivot_column), torch.from_numpy(pivot_row), alpha=-1)
        table[row] = pivot_row
        table[:, column] = -pivot_column / entry
        table[row, column] = 1.0 / entry
        permutation[[row, rank + column]] = permutation[[rank + column, row]]


def _skip_block_(b: torch.Tensor, a: torch.Tensor, bound: float = _BOUND) -> Factors:
    """Rewrite B A, float64 [m, r] and [r, n], so that r of the inputs pass straight to the latent.

    B is overwritten.

    Raises:
        ValueError: shapes that do not fit.
    """
    rank = a.shape[0]
    if b.shape[1] != rank:
        raise ValueError(f"B {tuple(b.shape)} and A {tuple(a.shape)} do not fit")
    permutation, interpolation = _strong_pivots(a, bound)
    pivots = a.double()[:, permutation[:rank]]
    for rows in row_blocks(len(b)):
        b[rows] = b[rows] @ pivots
    return Factors("skip", rank, b, interpolation, permutation, 0.0)


@dataclass(frozen=True)
class QuantizedFactors:
    """Factors of which some are quantised.

    Attributes:
        factors: with the values that the codes stand for.
        down: codes of A' or A; None where it is not rounded.
        up: codes of B' or B; None where it is not rounded.
    """

    factors: Factors
    down: Blocks | None
    up: Blocks | None


def _gptq_factors(
    factors: Factors,
    target: torch.Tensor,
    geometry: torch.Tensor,
    sensitivities: Sequence[Sensitivity],
    formats: _Formats,
) -> QuantizedFactors:
    """Quantise the factors of a stack W [m, n] by GPTQ, S of its input, G of each of its matrices.

    Formats are of `down` and of `up`; None leaves one as it is.
    """
    down_format, up_format = formats
    down = up = None
    if down_format is not None and factors.down.numel():
        worth = weighted_gram(factors.up, sensitivities)
        multiplied = factors.moment_of_down(geometry)
        down = gptq(factors.down, down_format, multiplied, [worth])
        factors = replace(factors, down=down.values())
    latent = factors.latent_map()
    moment = latent @ geometry @ latent.T
    if down is not None:
        factors = replace(factors, up=_refitted(target, geometry, latent, moment))
    if up_format is not None:
        up = gptq(factors.up, up_format, moment, sensitivities)
        factors = replace(factors, up=up.values())
    return QuantizedFactors(factors, down, up)


def _rtn_factors(factors: Factors, formats: _Formats) -> QuantizedFactors:
    """Quantise the factors of a stack, each number to its nearest."""
    down_format, up_format = formats
    down = rtn(factors.down, down_format) if down_format and factors.down.numel() else None
    up = rtn(factors.up, up_format) if up_format else None
    if down is not None:
        factors = replace(factors, down=down.values())
    if up is not None:
        factors = replace(factors, up=up.values())
    return QuantizedFactors(factors, down, up)


def rtn(weight: torch.Tensor, format: Format) -> Blocks:
    """Codes of a matrix [m, n], each number rounded to its nearest."""
    values, width = weight.float().numpy(), format.width(weight.shape[1])
    return quantize_blocks(values, format.bits, width, zero=format.zero)


def _refitted(
    target: torch.Tensor, geometry: torch.Tensor, latent: torch.Tensor, moment: torch.Tensor
) -> torch.Tensor:
    """B* = W S T^T S_z^-1, float64 [m, r], with a ridge for latents that hardly move."""
    regular = moment.clone()
    regular.diagonal().add_(_RELATIVE_RIDGE * moment.diagonal().mean())
    factored, projected = torch.linalg.lu_factor(regular), latent @ geometry
    found = torch.empty(len(target), len(latent), dtype=torch.float64)
    for rows in row_blocks(len(target)):
        found[rows] = torch.linalg.lu_solve(*factored, projected @ target[rows].double().T).T
    return found


@dataclass(frozen=True)
class Rounding:
    """A way to quantise.

    Attributes:
        matrix: (matrix [m, n], format, geometry [n, n], sensitivities) -> codes.
        factors: (factors, target, geometry, sensitivities, formats) -> quantised factors.
        needs_moments: whether geometry and sensitivities are looked at.
    """

    matrix: Callable[[torch.Tensor, Format, torch.Tensor, Sequence[Sensitivity]], Blocks]
    factors: Callable[
        [Factors, torch.Tensor, torch.Tensor, Sequence[Sensitivity], _Formats], QuantizedFactors
    ]
    needs_moments: bool


GPTQ = Rounding(gptq, _gptq_factors, True)
RTN = Rounding(
    lambda matrix, format, *_: rtn(matrix, format),
    lambda factors, target, geometry, sensitivities, formats: _rtn_factors(factors, formats),
    False,
)
