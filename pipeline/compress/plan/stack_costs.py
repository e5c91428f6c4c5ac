"""What a stack of matrices is worth, out of its moments: tensors in, tensors out.

The KL that truncating and rounding its matrices should cost, and in what geometry errors of them
count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.calibrate.hooks import not_finite
from pipeline.calibrate.moments import Balanced
from pipeline.compress.factorize.factors import Form
from pipeline.compress.factorize.second_moments import ROWS_AT_ONCE, Shrunk, is_zero
from pipeline.compress.factorize.whitened_svd import truncation_losses
from pipeline.compress.plan.plan import Members
from pipeline.compress.plan.quantization_costs import StackCost
from pipeline.compress.request import CompressRequest
from pipeline.quantize.formats import Format
from pipeline.quantize.sensitivity import Sensitivity

# Memory, measured at 1024 to 5376 wide: float64 numbers for each of these, with formats or without.
_OF_INPUTS, _OF_OUTPUTS = 2.5, 2.0
_OF_WIDE, _OF_WIDE_SPECTRUM = 1.4, 1.3
_OF_TALL, _OF_TALL_SPECTRUM = 1.0, 1.2
# Of libraries, and of a heap that keeps what is freed of the smaller ones.
_SMALL_BYTES = 1 << 27
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
        inputs: keep the moments of inputs, too, for a fit to the original model's.
    """

    cat: bool = True
    formats: tuple[Format, ...] = ()
    form: Form = "skip"
    seed: int = 0
    inputs: bool = False

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

    def sensitivities(self) -> list[Sensitivity]:
        """Shrunk G of each output, [m_i, m_i], of full rank."""
        return list(_counting(self.outputs))

    def geometry(self, moment: torch.Tensor) -> Balanced:
        """What errors are measured in, from S of the input, float [n, n]."""
        return Balanced(moment, self.weighted)


CostsOfStack = tuple[torch.Tensor, StackCost | None]


def stack_costs(
    stack: Members,
    wanted: CostRequest,
    seen: torch.Tensor,
    weighted: torch.Tensor,
    *matrices: torch.Tensor,
) -> CostsOfStack:
    """Of one stack of matrices with one input: what truncation costs at each rank, and rounding.

    Args:
        stack: names of the matrices.
        wanted: which costs.
        seen: S of the input, float [n, n].
        weighted: the same, tokens weighted by their gradients.
        matrices: W of each, float [m_i, n], and then G of what each returns, float [m_i, m_i].

    Returns:
        Nats at every rank from 0 to full, float64 [min(m, n) + 1]; nats of rounding, or None.

    Raises:
        InputError: moments that cannot be used; names the matrices.
    """
    weights, outputs = matrices[: len(stack)], matrices[len(stack) :]
    stacked = weights[0] if len(weights) == 1 else torch.cat(weights)
    if is_zero(seen) or all(map(is_zero, outputs)) or not stacked.any():
        return _no_costs(stacked, wanted)
    try:
        parts, geometry = _counting(outputs), Balanced(seen, weighted)
        if not wanted.formats:
            return truncation_losses(stacked, geometry, parts) / 2, None
        whole = geometry.double()
        curve = truncation_losses(stacked, whole, parts) / 2
        rounding = StackCost.measure(stacked, whole, parts, wanted.formats, wanted.form)
        return curve, rounding
    except ValueError as error:
        raise not_finite(", ".join(stack), error) from error


def cost_bytes(columns: int, heights: Sequence[int], wanted: CostRequest) -> int:
    """Memory that `stack_costs` takes beside its arguments, about.

    Args:
        columns: n.
        heights: m_i of the members.
        wanted: which costs.
    """
    rows = sum(heights)
    full = min(rows, columns)
    spectrum = full**2
    if wanted.formats:
        numbers = max(_OF_INPUTS * columns**2, _OF_OUTPUTS * max(heights) ** 2)
        numbers += full * (rows + columns) + columns**2
    elif rows <= columns:
        numbers = _OF_WIDE * rows * columns + _OF_WIDE_SPECTRUM * spectrum
        numbers += min(columns, ROWS_AT_ONCE) * columns
    else:
        tallest = max(heights)
        numbers = _OF_TALL * tallest * (columns + min(tallest, ROWS_AT_ONCE))
        numbers += _OF_TALL_SPECTRUM * spectrum + columns**2
    # Several are stacked, in float32.
    numbers += rows * columns / 2 if len(heights) > 1 else 0
    return int(8 * numbers) + _SMALL_BYTES


def _no_costs(stacked: torch.Tensor, wanted: CostRequest) -> CostsOfStack:
    """Of a stack that is zero or is given nothing, or whose outputs reach no logit."""
    curve = torch.zeros(min(stacked.shape) + 1, dtype=torch.float64)
    count = len(wanted.formats)
    none = (np.zeros((1, count)) for _ in range(2))
    free = StackCost(np.zeros(count), np.array([1]), *none)
    return curve, free if wanted.formats else None


def _counting(outputs: Sequence[torch.Tensor]) -> list[Shrunk]:
    """Sensitivities of full rank, those of members without effect next to nothing."""
    means = [float(output.diagonal().double().mean()) for output in outputs]
    nothing = max(means) * _NEXT_TO_NOTHING or 1.0
    return [
        Shrunk(output, _SENSITIVITY_SHRINKAGE, _SENSITIVITY_SHRINKAGE * mean or nothing)
        for output, mean in zip(outputs, means, strict=True)
    ]
