"""Which convolutions are in few bits and which in numbers, under a budget of bytes or MACs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.compress.plan.knapsack import allocate
from pipeline.errors import InputError
from pipeline.progress import note

_FLOAT_BYTES, _SCALE_BYTES = 4, 2


@dataclass(frozen=True)
class ConvChoice:
    """What a convolution costs either way.

    Attributes:
        rounded: bytes or multiplications with codes.
        kept: the same with numbers.
        loss: what rounding it loses; what lies below 0 is noise.
    """

    rounded: int
    kept: int
    loss: float

    @classmethod
    def of_bytes(cls, kernel: int, outputs: int, loss: float, bits: int = 8) -> ConvChoice:
        """Of a kernel of so many numbers for so many outputs: codes and a scale for each output."""
        codes = outputs * -(-kernel // outputs * bits // 8)
        bias = outputs * _FLOAT_BYTES
        return cls(codes + outputs * _SCALE_BYTES + bias, kernel * _FLOAT_BYTES + bias, loss)

    @classmethod
    def of_float_macs(cls, macs: int, loss: float) -> ConvChoice:
        """Of multiplications of numbers, which those of codes do not add to."""
        return cls(0, macs, loss)


def rounded_convs(choices: Mapping[str, ConvChoice], budget: int) -> list[str]:
    """The convolutions to round, so that least is lost within the budget: an integer program.

    Losses are taken to add, as those of ranks and formats are.

    Args:
        choices: of each convolution, by its name.
        budget: bytes or multiplications of all of them together.

    Returns:
        Names, in the order of `choices`; a convolution that loses nothing is rounded in any case.

    Raises:
        InputError: not even with all of them rounded are they within the budget.
    """
    least = sum(choice.rounded for choice in choices.values())
    if budget < least:
        raise InputError(
            "The budget is too small for the convolutions.",
            observed=budget,
            expected=f"at least {least}, which all of them need as codes",
        )
    if budget == least:
        return list(choices)
    sizes = [np.array([choice.rounded, choice.kept]) for choice in choices.values()]
    losses = [np.array([max(choice.loss, 0.0), 0.0]) for choice in choices.values()]
    chosen = allocate(sizes, losses, budget, note)
    return [name for name, place in zip(choices, chosen, strict=True) if place == 0]
