"""From what is seen of a tensor to its grid: minimum and maximum, percentiles, least squares.

Tensors in, numbers out. The range of an activation holds 0 always, so that what a convolution is
padded with is on the grid.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pipeline.checkpoint.modeling_quantized import Codes
from pipeline.errors import InputError
from pipeline.int8.grids import ActivationGrid, short_scale

_BINS = 2048
_SHARE = 0.9999  # of numbers that the range of percentiles holds
_FRACTIONS = torch.linspace(0.02, 1.0, 50, dtype=torch.float64)
_WEIGHT_FRACTIONS = torch.linspace(0.3, 1.0, 36)


class Observer:
    """What is seen of one tensor: first its extremes, then how often each value occurs.

    `see` every batch, and then, if a histogram is wanted, `count` every batch again.

    Args:
        name: of the tensor, for messages.

    Attributes:
        low: the smallest value, at most 0.
        high: the largest, at least 0.
        counts: float64 [bins] over the range; zeros before anything is counted.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.low, self.high = 0.0, 0.0
        self.counts = torch.zeros(_BINS, dtype=torch.float64)

    def see(self, x: torch.Tensor) -> None:
        """Widen the range to a tensor's.

        Raises:
            InputError: a number of it is not finite.
        """
        low, high = (float(value) for value in x.detach().aminmax())
        if not (abs(low) < torch.inf and abs(high) < torch.inf):
            raise InputError(
                "Calibration met numbers that are not finite.",
                where=self.name,
                observed=f"{low} to {high}",
                change="look at the model, and at what it is calibrated on",
            )
        self.low, self.high = min(self.low, low), max(self.high, high)

    def count(self, x: torch.Tensor) -> None:
        """Add a tensor to the histogram of the range that was seen."""
        if self.high > self.low:
            flat = x.detach().float().flatten().cpu()
            self.counts += torch.histc(flat, _BINS, self.low, self.high).double()

    @property
    def centres(self) -> torch.Tensor:
        """The middle of each bin, float64 [bins]."""
        places = (torch.arange(_BINS, dtype=torch.float64) + 0.5) / _BINS
        return self.low + (self.high - self.low) * places


def _grid_of(low: float, high: float, codes: Codes, symmetric: bool) -> ActivationGrid:
    """The grid that just holds a range.

    Args:
        low: at most 0.
        high: at least 0.
        codes: of the grid.
        symmetric: count them from 0; else from where they hold the range with the least steps.

    Returns:
        Its scale is short (see `short_scale`), and 1 where the range is empty: a tensor of zeros
        has no other code than 0.
    """
    if not high > low:
        return ActivationGrid(codes, 1.0, 0 if symmetric else codes.low)
    if symmetric:
        step = max(high / codes.high, low / codes.low if codes.low else 0.0)
        return ActivationGrid(codes, _short(step))
    scale = _short((high - low) / (codes.high - codes.low))
    zero = round(codes.low - low / scale)
    return ActivationGrid(codes, scale, min(max(zero, codes.low), codes.high))


def _short(step: float) -> float:
    return float(short_scale(torch.tensor(step)))


def _min_max(seen: Observer, codes: Codes, symmetric: bool) -> ActivationGrid:
    """All that was seen."""
    return _grid_of(seen.low, seen.high, codes, symmetric)


def _percentile(seen: Observer, codes: Codes, symmetric: bool) -> ActivationGrid:
    """All but the outermost numbers, one in ten thousand; half as many on each of two sides."""
    total = seen.counts.sum()
    if not total:
        return _min_max(seen, codes, symmetric)
    two_sided = seen.low < 0 < seen.high
    left = (1 - _SHARE) * total / (2 if two_sided else 1)
    upto = seen.counts.cumsum(0)
    width = (seen.high - seen.low) / _BINS
    high = seen.low + width * (1 + int((upto < total - left).sum()))
    low = seen.low + width * int((upto <= left).sum())
    return _grid_of(
        min(low, 0.0) if seen.low < 0 else 0.0, max(min(high, seen.high), 0.0), codes, symmetric
    )


def _least_squares(seen: Observer, codes: Codes, symmetric: bool) -> ActivationGrid:
    """The range whose grid errs least, squared, over the histogram."""
    if not seen.counts.sum():
        return _min_max(seen, codes, symmetric)
    highs = seen.high * _FRACTIONS
    lows = highs * (seen.low / seen.high) if seen.high > 0 else seen.low * _FRACTIONS
    if symmetric or seen.low == 0 or seen.high == 0:
        pairs = torch.stack((lows, highs), dim=1)
    else:
        pairs = torch.cartesian_prod(seen.low * _FRACTIONS[::2], seen.high * _FRACTIONS[1::2])
    grids = [_grid_of(low, high, codes, symmetric) for low, high in pairs.tolist()]
    scales = torch.tensor([grid.scale for grid in grids], dtype=torch.float64)[:, None]
    zeros = torch.tensor([grid.zero for grid in grids], dtype=torch.float64)[:, None]
    placed = ((seen.centres / scales).round() + zeros).clamp(codes.low, codes.high)
    errors = ((placed - zeros) * scales - seen.centres).square() @ seen.counts
    return grids[int(errors.argmin())]


OBSERVERS: dict[str, Callable[[Observer, Codes, bool], ActivationGrid]] = {
    "min-max": _min_max,
    "percentile": _percentile,
    "mse": _least_squares,
}


def weight_scales(
    weight: torch.Tensor, codes: Codes, *, per_channel: bool = True, squares: bool = False
) -> torch.Tensor:
    """Scales of a convolution's weights, which are counted from 0.

    Args:
        weight: float [m, n, ...].
        codes: of the grid; the outermost negative one is not used.
        per_channel: each output has its own; else all have the same.
        squares: the scale of least squared error, else that which just holds the largest weight.

    Returns:
        Float32 [m], short (see `short_scale`).

    Raises:
        InputError: a weight is not finite.
    """
    rows = weight.detach().flatten(1).float()
    largest = rows.abs().amax(1)
    if not bool(largest.isfinite().all()):
        raise InputError("A weight is not finite.", observed=f"channel {int(largest.argmax())}")
    if not per_channel:
        largest = largest.max().expand(len(rows))
    if squares:
        largest = largest * _best_fractions(rows, largest, codes, per_channel)
    return short_scale(largest / codes.high)


def _best_fractions(
    rows: torch.Tensor, largest: torch.Tensor, codes: Codes, per_channel: bool
) -> torch.Tensor:
    """The part of each channel's range that errs least, squared, when it is rounded: [m]."""
    errors = []
    for fraction in _WEIGHT_FRACTIONS:
        scales = short_scale(largest * fraction / codes.high)[:, None]
        error = (codes.rounded(rows, scales) - rows).square().sum(1)
        errors.append(error if per_channel else error.sum().expand(len(rows)))
    best: torch.Tensor = _WEIGHT_FRACTIONS[torch.stack(errors).argmin(0)]
    return best
