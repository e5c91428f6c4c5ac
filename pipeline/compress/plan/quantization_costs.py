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

from pipeline.compress.factorize.factors import Factors, Form
from pipeline.compress.factorize.second_moments import weighted_gram
from pipeline.compress.factorize.whitened_svd import Spectrum
from pipeline.compress.plan.plan import Members
from pipeline.quantize.formats import Format
from pipeline.quantize.gptq import InputPivots, expected_error, output_pivots
from pipeline.quantize.sensitivity import Sensitivity

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

    def times(self, factor: float) -> StackCost:
        """The same, each cost so many times as high."""
        return StackCost(self.dense * factor, self.ranks, self.down * factor, self.up * factor)

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

    @classmethod
    def measure(
        cls,
        weight: torch.Tensor,
        geometry: torch.Tensor,
        sensitivities: Sequence[Sensitivity],
        formats: Sequence[Format],
        form: Form,
    ) -> StackCost:
        """Of one stack, measured.

        Args:
            weight: W, float [m, n].
            geometry: S of the input, float64 [n, n].
            sensitivities: G of each matrix of the stack, [m_i, m_i].
            formats: the formats.
            form: "skip" or "low_rank".

        Raises:
            ValueError: a moment that cannot be used.
        """
        outputs = output_pivots(sensitivities)
        dense = _of_formats(weight, formats, InputPivots.of(geometry), outputs)
        spectrum = Spectrum.of(weight, geometry, sensitivities)
        full = len(spectrum.energies)
        ranks = sorted({min(max(1, round(share * full)), max(1, full - 1)) for share in _SHARES})
        down, up = [], []
        for rank in ranks:
            factors = Factors.estimated(*spectrum.factors(rank), form)
            latent = factors.latent_map()
            worth = output_pivots([weighted_gram(factors.up, sensitivities)])
            multiplied = factors.moment_of_down(geometry)
            if factors.down.numel():
                down.append(_of_formats(factors.down, formats, InputPivots.of(multiplied), worth))
            else:
                down.append(np.zeros(len(formats)))
            up.append(
                _of_formats(
                    factors.up, formats, InputPivots.of(latent @ geometry @ latent.T), outputs
                )
            )
        return cls(dense, np.array(ranks), np.stack(down), np.stack(up))


# Of every stack.
QuantizationCosts = dict[Members, StackCost]


def _of_formats(
    weight: torch.Tensor, formats: Sequence[Format], inputs: InputPivots, outputs: np.ndarray | None
) -> np.ndarray:
    return np.array([expected_error(weight, format, inputs, outputs) for format in formats])
