"""Quantised factors: each rounded with what it multiplies in view, the second refitted between.

y = B z, z = T x. For block skipping T = [I A'] P^T, else T = A. An error E in A costs
tr(B^T G B E S_2 E^T), S_2 the moment of what A multiplies; once A is rounded to Q(A), z and its
moment S_z = T S T^T are known, and B becomes the least-squares answer to the target W on that z,

    B* = W S T^T S_z^-1,

before it is rounded in the geometry of S_z and G: it makes up for the errors of A.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from pipeline.compress.factorize.factors import Factors
from pipeline.compress.factorize.whitened_svd import weighted_gram
from pipeline.quantize.formats import Format
from pipeline.quantize.gptq import gptq
from pipeline.quantize.groupwise import Blocks, dequantize_blocks, quantize_blocks

_RELATIVE_RIDGE = 1e-6


@dataclass(frozen=True)
class _QuantizedFactors:
    """Factors of which some are quantised.

    Attributes:
        factors: with the values that the codes stand for.
        down: codes of A' or A; None where it is not rounded.
        up: codes of B' or B; None where it is not rounded.
    """

    factors: Factors
    down: Blocks | None
    up: Blocks | None


_Formats = tuple[Format | None, Format | None]


def _gptq_factors(
    factors: Factors,
    target: torch.Tensor,
    geometry: torch.Tensor,
    sensitivities: Sequence[torch.Tensor],
    formats: _Formats,
) -> _QuantizedFactors:
    """Quantise the factors of a stack by GPTQ: errors are fed forward.

    Args:
        factors: in float64.
        target: W, what their product stands for, float64 [m, n].
        geometry: S of the input, float64 [n, n].
        sensitivities: G of each matrix of the stack; none weighs all outputs alike.
        formats: of `down` and of `up`; None leaves one as it is.
    """
    down_format, up_format = formats
    down = up = None
    if down_format is not None and factors.down.numel():
        worth = weighted_gram(factors.up, sensitivities)
        multiplied = moment_of_down(factors, geometry)
        down = gptq(factors.down, down_format, multiplied, [worth])
        factors = replace(factors, down=values_of(down))
    latent = latent_map(factors)
    moment = latent @ geometry @ latent.T
    if down is not None:
        factors = replace(factors, up=_refitted(target, geometry, latent, moment))
    if up_format is not None:
        up = gptq(factors.up, up_format, moment, sensitivities)
        factors = replace(factors, up=values_of(up))
    return _QuantizedFactors(factors, down, up)


def _rtn_factors(factors: Factors, formats: _Formats) -> _QuantizedFactors:
    """Quantise the factors of a stack, each number to its nearest."""
    down_format, up_format = formats
    down = rtn(factors.down, down_format) if down_format and factors.down.numel() else None
    up = rtn(factors.up, up_format) if up_format else None
    if down is not None:
        factors = replace(factors, down=values_of(down))
    if up is not None:
        factors = replace(factors, up=values_of(up))
    return _QuantizedFactors(factors, down, up)


def rtn(weight: torch.Tensor, format: Format) -> Blocks:
    """Codes of a matrix [m, n], each number rounded to its nearest."""
    values, width = weight.float().numpy(), format.width(weight.shape[1])
    return quantize_blocks(values, format.bits, width, zero=format.zero)


def latent_map(factors: Factors) -> torch.Tensor:
    """T with z = T x, float64 [r, n]."""
    if factors.permutation is None:
        return factors.down
    identity = torch.eye(factors.rank, dtype=torch.float64)
    return torch.cat([identity, factors.down], dim=1)[:, torch.argsort(factors.permutation)]


def moment_of_down(factors: Factors, geometry: torch.Tensor) -> torch.Tensor:
    """S of what `down` multiplies: x, or the part x2 that is no pivot; float64."""
    if factors.permutation is None:
        return geometry
    others = factors.permutation[factors.rank :]
    return geometry[others][:, others]


def _refitted(
    target: torch.Tensor, geometry: torch.Tensor, latent: torch.Tensor, moment: torch.Tensor
) -> torch.Tensor:
    """B* = W S T^T S_z^-1, float64 [m, r], with a ridge for latents that hardly move."""
    regular = moment.clone()
    regular.diagonal().add_(_RELATIVE_RIDGE * moment.diagonal().mean())
    return torch.linalg.solve(regular, latent @ geometry @ target.double().T).T


def values_of(blocks: Blocks) -> torch.Tensor:
    """What codes stand for, float64 [m, n]."""
    return torch.from_numpy(dequantize_blocks(blocks)).double()


@dataclass(frozen=True)
class Rounding:
    """A way to quantise.

    Attributes:
        matrix: (matrix [m, n], format, geometry [n, n], sensitivities) -> codes.
        factors: (factors, target, geometry, sensitivities, formats) -> quantised factors.
        needs_moments: whether geometry and sensitivities are looked at.
    """

    matrix: Callable[[torch.Tensor, Format, torch.Tensor, Sequence[torch.Tensor]], Blocks]
    factors: Callable[
        [Factors, torch.Tensor, torch.Tensor, Sequence[torch.Tensor], _Formats], _QuantizedFactors
    ]
    needs_moments: bool


GPTQ = Rounding(gptq, _gptq_factors, True)
RTN = Rounding(
    lambda matrix, format, *_: rtn(matrix, format),
    lambda factors, target, geometry, sensitivities, formats: _rtn_factors(factors, formats),
    False,
)
