"""What rounding costs one stack of matrices: dense, and as factors of any rank, in every format.

Measured at a few ranks (`quantize.expected_error`) and interpolated between, as MLoRQ does; what
truncation costs is known at every rank. The three errors (truncation, A', B') are taken as
independent, so their costs add.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.compress.factorize.block_skip import quick_pivots
from pipeline.compress.factorize.factors import Factors
from pipeline.compress.factorize.quantized_factors import latent_map, moment_of_down
from pipeline.compress.factorize.whitened_svd import Spectrum, weighted_gram, whitened_spectrum
from pipeline.compress.forms import Form
from pipeline.quantize.expected_error import (
    InputPivots,
    expected_error,
    input_pivots,
    output_pivots,
)
from pipeline.quantize.formats import Format

# Of the full rank.
_SHARES = (0.15, 0.5, 0.85)
_SMALLEST_COST = 1e-30


@dataclass(frozen=True)
class StackCost:
    """Expected cost of rounding a stack, nats per token, for each of some formats.

    Attributes:
        dense: of the matrices as they are, float64 [formats].
        ranks: where the factors were measured, int64 [k], rising.
        down: of A' or A, float64 [k, formats].
        up: of B' or B, float64 [k, formats].
    """

    dense: np.ndarray
    ranks: np.ndarray
    down: np.ndarray
    up: np.ndarray

    def at(self, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cost of `down` and of `up` at other ranks, float64 [len(ranks), formats] each.

        Logarithms are interpolated; beyond the ends the nearest rank stands.
        """
        tables = []
        for table in (self.down, self.up):
            logs = np.log(np.maximum(table, _SMALLEST_COST))
            columns = [np.interp(ranks, self.ranks, logs[:, i]) for i in range(logs.shape[1])]
            tables.append(np.exp(np.stack(columns, axis=1)))
        return tables[0], tables[1]


def stack_cost(
    weight: torch.Tensor,
    geometry: torch.Tensor,
    sensitivities: Sequence[torch.Tensor],
    formats: Sequence[Format],
    form: Form,
) -> StackCost:
    """Measure a stack.

    Args:
        weight: W, float [m, n].
        geometry: S of the input, float64 [n, n].
        sensitivities: G of each matrix of the stack, float64 [m_i, m_i].
        formats: the formats.
        form: "skip" or "low_rank".

    Raises:
        ValueError: a moment that cannot be used.
    """
    outputs = output_pivots(sensitivities)
    dense = _of_formats(weight, formats, input_pivots(geometry), outputs)
    spectrum = whitened_spectrum(weight, geometry, sensitivities)
    full = len(spectrum.energies)
    ranks = sorted({min(max(1, round(share * full)), max(1, full - 1)) for share in _SHARES})
    down, up = [], []
    for rank in ranks:
        factors = _factors(spectrum, rank, form)
        latent = latent_map(factors)
        worth = output_pivots([weighted_gram(factors.up, sensitivities)])
        multiplied = moment_of_down(factors, geometry)
        if factors.down.numel():
            down.append(_of_formats(factors.down, formats, input_pivots(multiplied), worth))
        else:
            down.append(np.zeros(len(formats)))
        up.append(
            _of_formats(factors.up, formats, input_pivots(latent @ geometry @ latent.T), outputs)
        )
    return StackCost(dense, np.array(ranks), np.stack(down), np.stack(up))


def _factors(spectrum: Spectrum, rank: int, form: Form) -> Factors:
    b, a = spectrum.factors(rank)
    if form == "low_rank":
        return Factors(form, rank, b, a, None, 0.0)
    permutation, interpolation = quick_pivots(a)
    return Factors(form, rank, b @ a[:, permutation[:rank]], interpolation, permutation, 0.0)


def _of_formats(
    weight: torch.Tensor, formats: Sequence[Format], inputs: InputPivots, outputs: np.ndarray | None
) -> np.ndarray:
    return np.array([expected_error(weight, format, inputs, outputs) for format in formats])
