"""What one group of matrices is worth, out of its moments: tensors in, tensors out.

The KL that truncating and rounding its matrices should cost, of every stack of them; and in what
geometry errors of them count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.calibrate.hooks import not_finite
from pipeline.calibrate.moments import balanced
from pipeline.compress.factorize.factors import Form
from pipeline.compress.factorize.whitened_svd import is_zero, regular, shrunk, truncation_losses
from pipeline.compress.plan.plan import Members
from pipeline.compress.plan.quantization_costs import StackCost
from pipeline.compress.request import CompressRequest
from pipeline.quantize.formats import Format

# Memory, measured at 1024 to 4096 wide: float64 numbers for each of these; times with formats.
_OF_MOMENTS, _OF_SPECTRA, _WITH_FORMATS = 1.9, 4.8, 2.75
_SMALL_BYTES = 1 << 26
# Of the sensitivities, which are estimated from few tokens.
_SENSITIVITY_SHRINKAGE = 0.1
_NEXT_TO_NOTHING = 1e-12


@dataclass(frozen=True)
class CostRequest:
    """Which costs are wanted.

    Attributes:
        cat: of stacks of several members, too.
        formats: low-bit formats whose cost is wanted.
        form: of the factors that will be rounded.
        seed: of what is drawn from the model's own distribution.
    """

    cat: bool = True
    formats: tuple[Format, ...] = ()
    form: Form = "skip"
    seed: int = 0

    @classmethod
    def of(cls, request: CompressRequest) -> CostRequest:
        """What a request's method and budget are decided by."""
        method = request.resolved_method
        form: Form = "skip" if method.skip else "low_rank"
        return cls(method.cat, request.formats, form, request.seed)


@dataclass(frozen=True)
class OutputStatistics:
    """What errors of some matrices with one input are worth, as it was measured.

    Attributes:
        weighted: S of the input, each token weighted by its squared gradient, float [n, n].
        outputs: G = E[g g^T] of what each matrix returns, float [m_i, m_i].
    """

    weighted: torch.Tensor
    outputs: tuple[torch.Tensor, ...]

    def sensitivities(self) -> list[torch.Tensor]:
        """Shrunk G of each output, float64 [m_i, m_i], of full rank."""
        return _counting([shrunk(moment, _SENSITIVITY_SHRINKAGE) for moment in self.outputs])

    def geometry(self, moment: torch.Tensor) -> torch.Tensor:
        """What errors are measured in, from S of the input, float64 [n, n]; float64 [n, n]."""
        return regular(balanced(moment, self.weighted))


StackCosts = dict[Members, tuple[torch.Tensor, StackCost | None]]


def group_costs(
    weights: Mapping[str, torch.Tensor],
    stacks: Sequence[Members],
    moment: torch.Tensor,
    statistics: OutputStatistics,
    wanted: CostRequest,
) -> StackCosts:
    """Of every stack of a group: what truncation costs at each rank, and what rounding costs.

    Args:
        weights: W of each member, float [m_i, n], in the order of the statistics' outputs.
        stacks: of the members.
        moment: S of the input, float64 [n, n].
        statistics: of the members.
        wanted: which costs.

    Returns:
        Nats at every rank from 0 to full, float64 [min(m, n) + 1]; nats of rounding, or None.

    Raises:
        InputError: moments that cannot be used; names the members.
    """
    geometry = balanced(moment, statistics.weighted)
    sensitivities = {
        member: shrunk(output, _SENSITIVITY_SHRINKAGE)
        for member, output in zip(weights, statistics.outputs, strict=True)
    }
    costs: StackCosts = {}
    try:
        for stack in stacks:
            stacked = torch.cat([weights[member] for member in stack])
            parts = [sensitivities[member] for member in stack]
            costs[stack] = _costs_of(stacked, geometry, parts, wanted)
    except ValueError as error:
        raise not_finite(", ".join(weights), error) from error
    return costs


def cost_bytes(columns: int, heights: Sequence[int], wanted: CostRequest) -> int:
    """Memory that `group_costs` takes beside its arguments, about.

    Args:
        columns: n.
        heights: m_i of the members.
        wanted: which costs.
    """
    moments = columns**2 + sum(height**2 for height in heights)
    spectrum = min(sum(heights), columns) ** 2
    numbers = _OF_MOMENTS * moments + _OF_SPECTRA * spectrum
    return int(8 * numbers * (_WITH_FORMATS if wanted.formats else 1)) + _SMALL_BYTES


def _costs_of(
    stacked: torch.Tensor, geometry: torch.Tensor, parts: list[torch.Tensor], wanted: CostRequest
) -> tuple[torch.Tensor, StackCost | None]:
    """Of one stack, in the geometry of its input and the sensitivities of its members."""
    if is_zero(geometry) or all(map(is_zero, parts)) or not stacked.any():
        return _no_costs(stacked, wanted)
    parts = _counting(parts)
    curve = truncation_losses(stacked, geometry, parts) / 2
    rounding = None
    if wanted.formats:
        rounding = StackCost.measure(stacked, geometry, parts, wanted.formats, wanted.form)
    return curve, rounding


def _no_costs(stacked: torch.Tensor, wanted: CostRequest) -> tuple[torch.Tensor, StackCost | None]:
    """Of a stack that is zero or is given nothing, or whose outputs reach no logit."""
    curve = torch.zeros(min(stacked.shape) + 1, dtype=torch.float64)
    count = len(wanted.formats)
    none = (np.zeros((1, count)) for _ in range(2))
    free = StackCost(np.zeros(count), np.array([1]), *none)
    return curve, free if wanted.formats else None


def _counting(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Sensitivities of a stack, those of members without effect next to nothing, but regular."""
    largest = max(float(part.diagonal().mean()) for part in parts)
    share = largest * _NEXT_TO_NOTHING if largest else 1.0
    return [share * regular(part) if is_zero(part) else part for part in parts]
