"""Coordinates of latents in which one number's rounding error is undone by another.

z of `LatentBasis` has E[z_i^2] = e_i, and an error of it costs half its square. Codes of a token
have one step, so that numbers of like spread are wanted, u_i = z_i / t_i, whose errors then cost
unlike: t_i^2. Rounded each by itself they cost the mean of t^2. In pairs, the i-th most with the
i-th least sensitive, x = t_i / t_j, each pair turned until

    w = [[c, s], [-s, c]] u,  s^2 = 1 / (1 + x):    z z^T = t_i t_j (d^2 + (d' + F d)^2)

for errors d, d' of the two, with F = (1 - x) / sqrt(x). The second is rounded after F d was taken
from it, and both cost t_i t_j, the geometric mean: the nearest-plane rule (Babai, 1986) for two
numbers, as GPTQ's feedback is for many. All first numbers are rounded, then all second ones.

The offset of a token's codes is added to all of them alike, at 16 bits. What the first token of a
sequence has beyond others, which all look at, is therefore made such, where bits are few: first
numbers that are all alike are a multiple of it, and second ones that are mean nothing, which leaves
one coordinate less.

t_i^2 = e_i^0.9 lies between the balance of spread and cost that is best without feedback (1/2)
and numbers that are all of one spread (1): the noise that is fed back widens the second numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pipeline.quantize.rotations import random_rotation

_EXPONENT = 0.9
# Of energies: what moves less is fed no more noise than this does.
_LEAST_ENERGY = 1e-4
# Noise that is fed back may add so much to what it is added to, before the estimate ends.
_MOST_NOISE = 0.9
# Of the best uniform quantiser of a normal number of 2^b levels (Max, 1960): bits -> its largest
# level, and the mean square of its error.
_OF_NORMAL = {2: (1.494, 0.1188), 3: (2.051, 0.03744), 4: (2.514, 0.01154), 5: (2.916, 0.003495)}
_FEW_BITS = 4
# The second numbers are wider by about so much.
_WIDER = 1.1


@dataclass(frozen=True)
class FedCoordinates:
    """r codes, the first h of them rounded before the others; h is r // 2.

    Attributes:
        into: float64 [r, coordinates], takes z to w.
        back: float64 [coordinates, r], takes w to z.
        feedback: float64 [r - h, h], what an error of the first h takes from the others.
    """

    into: torch.Tensor
    back: torch.Tensor
    feedback: torch.Tensor

    @classmethod
    def of(cls, energies: torch.Tensor, start: torch.Tensor | None, seed: int) -> FedCoordinates:
        """Those of z.

        Args:
            energies: e, falling, float64 [coordinates].
            start: z of the first token of a sequence, which codes that are all alike are then a
                multiple of; there is one coordinate less than codes. None for as many.
            seed: of the rotations that make numbers alike.
        """
        rank = len(energies) + (start is not None)
        half, scale = rank // 2, _scales(energies)
        if start is None:
            first, second = _pairs(scale, half)
            turns = random_rotation(half, seed), random_rotation(rank - half, seed)
        else:
            axes = _reflection(_direction(start / scale))
            others = axes[:, 1:]  # at right angles to the start
            weights, vectors = torch.linalg.eigh(others.T @ (scale.square()[:, None] * others))
            pairs = _pairs(weights.flip(0).sqrt(), half - 1)
            first, second = (others @ vectors.flip(1) @ part for part in pairs)
            first = torch.cat([axes[:, :1], first], dim=1)
            turns = _onto_ones(half, seed), _onto_ones(rank - half, seed)[:, 1:]
        into = [turn @ part.T for turn, part in zip(turns, (first, second), strict=True)]
        if start is not None:
            # They share an offset, which means nothing in the second ones.
            into[1] = into[1] + into[0].mean(0)
        columns = scale[:, None] * first, scale[:, None] * second
        back = torch.cat([columns[0] @ turns[0].T, columns[1] @ turns[1].T], dim=1)
        fed = torch.linalg.lstsq(columns[1], columns[0]).solution
        return cls(torch.cat(into) / scale, back, turns[1] @ fed @ turns[0].T)


def _pairs(scale: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Axes of the first and of the second numbers of pairs, as columns; those left are seconds.

    Args:
        scale: t, falling, [n].
        count: of pairs.
    """
    size, place = len(scale), torch.arange(count)
    ratio = scale[:count] / scale.flip(0)[:count]
    sine, cosine = (1 / (1 + ratio)).sqrt(), (ratio / (1 + ratio)).sqrt()
    first = torch.zeros(size, count, dtype=scale.dtype)
    second = torch.zeros(size, size - count, dtype=scale.dtype)
    first[place, place], first[size - 1 - place, place] = cosine, sine
    second[place, place], second[size - 1 - place, place] = -sine, cosine
    left = torch.arange(count, size - count)
    second[left, left] = 1
    return first, second


def _onto_ones(size: int, seed: int) -> torch.Tensor:
    """Orthogonal [size, size]: the first axis becomes numbers that are all alike."""
    turned = torch.eye(size, dtype=torch.float64)
    if size > 1:
        turned[1:, 1:] = random_rotation(size - 1, seed)
    return _reflection(_direction(torch.ones(size, dtype=torch.float64))) @ turned


def _direction(vector: torch.Tensor) -> torch.Tensor:
    """Of length 1; the first axis where there is nothing."""
    length = torch.linalg.vector_norm(vector)
    return vector / length if length > 0 else torch.eye(len(vector), dtype=vector.dtype)[0]


def _reflection(direction: torch.Tensor) -> torch.Tensor:
    """Orthogonal and symmetric (Householder): takes the first axis to a direction."""
    normal = -direction.clone()
    normal[0] += 1
    square = normal @ normal
    identity = torch.eye(len(direction), dtype=direction.dtype)
    return identity - 2 / square * normal.outer(normal) if square > 0 else identity


def rounding_losses(energies: torch.Tensor, bits: int) -> np.ndarray:
    """Expected KL of r codes of so many bits for the first r coordinates, nats, float64 [n + 1].

    Sums over pairs are convolutions: the partner of i among r is r - 1 - i.

    Args:
        energies: e, falling, [n].
        bits: of a number.
    """
    scale = _scales(energies).numpy()
    ranks = np.arange(1, len(scale) + 1)
    costs = np.convolve(scale, scale)[: len(scale)]
    spread = np.cumsum(energies.numpy() / scale**2) / ranks
    fed = np.convolve(scale, 1 / scale)[: len(scale)] / ranks - 1
    errors = _relative_errors(ranks, bits)
    noise = errors * spread / (1 - (errors * fed).clip(max=_MOST_NOISE))
    missing = np.array([has_start(int(rank), len(scale), bits) for rank in ranks])
    return np.r_[0.0, (costs * noise + missing * energies.numpy()) / 2]


def has_start(rank: int, numbers: int, bits: int) -> bool:
    """Whether r codes are for one coordinate less, so that the start of a text is held well.

    Of many bits, and of all numbers, what is left out would cost more than that is worth.
    """
    return bits <= _FEW_BITS and 1 < rank < numbers


def clip_of(rank: int, bits: int) -> float:
    """Share of their range that codes of so many normal numbers reach where they err least."""
    if bits not in _OF_NORMAL:
        return 1.0
    share = _WIDER * 2 * _OF_NORMAL[bits][0] / _range_of_normal(np.array([rank]))[0]
    return min(1.0, round(float(share), 2))


def _range_of_normal(counts: np.ndarray) -> np.ndarray:
    """Expected range of so many numbers drawn from N(0, 1); Blom's approximation."""
    from scipy.special import ndtri

    return 2 * ndtri((counts - 0.375) / (counts + 0.25)).clip(0.5)


def _relative_errors(ranks: np.ndarray, bits: int) -> np.ndarray:
    """Mean square of the errors of so many normal numbers, whose range is clipped where it pays."""
    whole = (_range_of_normal(ranks) / (2**bits - 1)) ** 2 / 12
    return np.minimum(whole, _OF_NORMAL[bits][1]) if bits in _OF_NORMAL else whole


def _scales(energies: torch.Tensor) -> torch.Tensor:
    floor = _LEAST_ENERGY * float(energies[0].clamp_min(1e-300)) if len(energies) else 0.0
    return energies.clamp_min(floor) ** (_EXPONENT / 2)
