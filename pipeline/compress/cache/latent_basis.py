"""The basis in which keys or values are cut to a rank and rounded to few bits.

For outputs y of a projection, with mean m, C = E[(y - m)(y - m)^T] and G = E[g g^T] = L^T L the
Fisher information at y, an error d of y costs E (g . d)^2 / 2 nats of KL. With

    L C L^T = U diag(e) U^T,  z = U^T L (y - m),  y = m + L^-1 U z

an error of z costs half its square, and E[z_i^2] = e_i: cutting to the first r coordinates costs
half of the tail of e. With G = 1 this is Palu's whitened truncation (Chang et al., ICLR 2025,
section 3.2), whose left singular vectors are the same U.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.compress.cache.latent_rounding import FedCoordinates, has_start, rounding_losses

_RELATIVE_FLOOR = 1e-9
# Of whitened energies: a coordinate that never moves has no scale.
_LEAST_ENERGY = 1e-12
# A scale and an offset for each token, in float16.
SCALE_BITS = 32


@dataclass(frozen=True)
class LatentBasis:
    """Outputs in falling order of what they are worth.

    Attributes:
        energies: e, twice the nats that losing each coordinate costs, falling, float64 [n].
        down: U^T L, float64 [n, n]: rows take y - m to z.
        up: L^-1 U, float64 [n, n]: columns take z back.
        mean: m, float64 [n].
        start: z of the first token of a sequence, float64 [n].
    """

    energies: torch.Tensor
    down: torch.Tensor
    up: torch.Tensor
    mean: torch.Tensor
    start: torch.Tensor

    @classmethod
    def of(
        cls,
        moment: torch.Tensor,
        mean: torch.Tensor,
        sensitivity: torch.Tensor | None = None,
        start: torch.Tensor | None = None,
    ) -> LatentBasis:
        """The basis of outputs with these moments.

        Args:
            moment: E[(y - m)(y - m)^T], float64 [n, n].
            mean: m, float64 [n]; zero where nothing is subtracted.
            sensitivity: G, float64 [n, n], of full rank; None weighs all outputs alike.
            start: what the first token of a sequence has in the mean, float64 [n]; None for m.

        Raises:
            ValueError: moments that are not finite.
        """
        for name, tensor in (("second moment", moment), ("mean", mean)):
            if not torch.isfinite(tensor).all():
                raise ValueError(f"the {name} of keys or values holds NaN or infinite values")
        root, inverse = _root(sensitivity, len(moment))
        weighted = root @ moment.double() @ root
        energies, vectors = torch.linalg.eigh((weighted + weighted.T) / 2)
        vectors = vectors.flip(1)
        mean, down = mean.double(), vectors.T @ root
        first = down @ ((mean if start is None else start.double()) - mean)
        return cls(energies.flip(0).clamp_min(0), down, inverse @ vectors, mean, first)

    def truncation_losses(self) -> np.ndarray:
        """Expected KL of keeping r coordinates, nats a token, float64 [n + 1]."""
        tails = torch.cat([self.energies.flip(0).cumsum(0).flip(0), self.energies.new_zeros(1)])
        return (tails / 2).numpy()

    def rounding_losses(self, bits: int) -> np.ndarray:
        """Expected KL of rounding the first r coordinates to so many bits, nats, float64 [n + 1].

        With errors fed back; see `latent_rounding`.
        """
        return rounding_losses(self.energies, bits)

    def fed_maps(
        self, rank: int, bits: int, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`down`, `up` and `feedback` of r codes whose errors are fed back.

        Args:
            rank: r, at least 2.
            bits: of a code.
            seed: of the rotations that make numbers alike.
        """
        led = has_start(rank, len(self.energies), bits)
        own = slice(rank - led)
        fed = FedCoordinates.of(self.energies[own], self.start[own] if led else None, seed)
        return fed.into @ self.down[own], self.up[:, own] @ fed.back, fed.feedback

    def maps(
        self, rank: int, *, balanced: bool, rotation: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`down` [r, n] and `up` [n, r] of the first r coordinates.

        Args:
            rank: r.
            balanced: scale coordinates so that rounding each by itself costs least: t_i^2 =
                sqrt(e_i), for spread times cost, sum e_i / t_i^2 times sum t_i^2, is then least
                (Cauchy-Schwarz); the gauge of Palu's symmetric factors, too.
            rotation: orthogonal [r, r], turns the coordinates; None leaves them.
        """
        down, up = self.down[:rank], self.up[:, :rank]
        if balanced and rank:
            floor = _LEAST_ENERGY * float(self.energies[0].clamp_min(1e-300))
            scale = self.energies[:rank].clamp_min(floor) ** 0.25
            down, up = down / scale[:, None], up * scale
        if rotation is not None:
            down, up = rotation @ down, up @ rotation.T
        return down, up


def _root(sensitivity: torch.Tensor | None, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric root of G and its inverse; of 1 where there is none."""
    if sensitivity is None:
        identity = torch.eye(width, dtype=torch.float64)
        return identity, identity
    if not torch.isfinite(sensitivity).all():
        raise ValueError("the sensitivity of keys or values holds NaN or infinite values")
    values, vectors = torch.linalg.eigh(sensitivity.double())
    largest = float(values[-1])
    if largest <= 0:
        # Nothing that is cached here is ever looked at: whatever is kept costs nothing.
        identity = torch.eye(width, dtype=torch.float64)
        return 1e-30 * identity, 1e30 * identity
    roots = values.clamp_min(_RELATIVE_FLOOR * largest).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def _latent_bits(rank: int, bits: int | None) -> int:
    """Bits that one token takes, its scale and offset included; 16 a number without rounding."""
    if rank == 0:
        return 0
    return 16 * rank if bits is None else bits * rank + SCALE_BITS


def kept_bytes(rank: int, bits: int | None, groups: int) -> int:
    """Bytes of one token, each group of heads filled up to whole bytes."""
    return groups * math.ceil(_latent_bits(rank, bits) / 8)
