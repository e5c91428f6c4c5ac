"""Codes and scales of a quantised matrix that are learned by gradients.

A weight is w = (clamp(round(c + v)) - z) s (1 + t): c the code it starts from, v how far it moved
in steps of the grid, and t how far its block's scale is stretched. Rounding passes gradients on as
if it were not there (SignRound: Cheng et al. 2024). c is no whole number where it is known what
rounding took from it: weights that rounding decided by a hair are then the first to turn.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from pipeline.quantize.groupwise import Blocks, as_float16

# Scales may be stretched by so much.
_MOST_STRETCH = 0.25
_BETAS = 0.9, 0.95
# In units of `scaled`.
_SMALL_GRADIENT = 1.0
# From its code that a weight may start at; it rounds to it.
_FARTHEST_REST = 0.49


class LearnedBlocks:
    """A quantised matrix whose codes and scales can be learned.

    Args:
        blocks: what it starts from.

    Attributes:
        moves: v, float32 [m, blocks, block]; without gradient until it is asked for.
        stretches: t, float32 [m, blocks, 1]; likewise.
    """

    def __init__(self, blocks: Blocks) -> None:
        self.start = blocks
        self._codes = torch.from_numpy(blocks.codes.astype(np.float32, order="C"))
        if blocks.rests_of_codes is not None:
            # Where rounding went either way, a step may take it back.
            rests = torch.from_numpy(blocks.rests_of_codes)
            self._codes += rests.clamp(-_FARTHEST_REST, _FARTHEST_REST)
        self._scales = torch.from_numpy(blocks.scales)[..., None]
        zeros = blocks.zero_points
        if zeros is None:
            zeros = np.full(blocks.scales.shape, 2 ** (blocks.bits - 1))
        self._zeros = torch.from_numpy(zeros.astype(np.float32))[..., None]
        self.moves = nn.Parameter(torch.zeros(self._codes.shape), requires_grad=False)
        self.stretches = nn.Parameter(torch.zeros(self._scales.shape), requires_grad=False)

    def values(self) -> torch.Tensor:
        """What the codes stand for as they are now, float32 [m, n], with gradients."""
        places = self._codes + self.moves
        codes = places + (self._rounded(places) - places).detach()
        return ((codes - self._zeros) * self._stretched()).flatten(1)[:, : self.start.columns]

    def _rounded(self, places: torch.Tensor) -> torch.Tensor:
        return places.round().clamp(0, 2**self.start.bits - 1)

    def _stretched(self) -> torch.Tensor:
        return self._scales * (1 + self.stretches.clamp(-_MOST_STRETCH, _MOST_STRETCH))

    @torch.no_grad()
    def blocks(self) -> Blocks:
        """The codes and scales as they are stored; scales are rounded to float16."""
        start = self.start
        scales = as_float16(self._stretched()[..., 0].numpy())
        codes = self._rounded(self._codes + self.moves).numpy().astype(np.uint8)
        zeros = start.zero_points
        if start.has_offsets:
            # Offsets are stored: they follow the scale as the codes do.
            zeros = -as_float16(start.offsets * (scales / start.scales)) / scales
        return Blocks(codes, scales, zeros, start.bits, start.columns)


def descent(parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """An optimizer of moves or of stretches, whose loss is `scaled`; each step sets its rate."""
    return torch.optim.AdamW(
        parameters, lr=0.0, betas=_BETAS, eps=_SMALL_GRADIENT, weight_decay=0.0
    )


def scaled(loss: torch.Tensor, before: float, parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """A loss in units of what each parameter has of it at the start, `before` in all.

    Those whose gradient is small in these units move less than others.
    """
    return loss * (sum(parameter.numel() for parameter in parameters) / before)
