"""Channel scaling: inputs that are always large become smaller, and their weights larger.

For any positive D, W x = (W D) (D^-1 x). What a block of weights shares is one scale, so a column
whose input is large should have large weights there: its errors cost most. AWQ's choice (Lin et
al. 2024) is a power of the input's size, d_j = s_j^a with s_j = sqrt(E[x_j^2]), here with mean 1.
With block skipping the pivot inputs pass straight to the latent, z = x1 + A' x2, so D takes the
outliers out of z as well.
"""

from __future__ import annotations

import torch

RELATIVE_FLOOR = 1e-4


def channel_scales(moment: torch.Tensor, power: float) -> torch.Tensor:
    """D of an input, float64 [n], with geometric mean 1.

    Args:
        moment: S = E[x x^T], float64 [n, n].
        power: a, in [0, 1]; 0 scales nothing, 1 makes all inputs equally large.

    Raises:
        ValueError: a power outside [0, 1], or a moment that is not finite.
    """
    if not 0 <= power <= 1:
        raise ValueError(f"power {power} is outside [0, 1]")
    sizes = moment.diagonal().double().clamp_min(0).sqrt()
    if not torch.isfinite(sizes).all():
        raise ValueError("the second moment holds NaN or infinite values")
    largest = float(sizes.max())
    if largest == 0:
        return torch.ones_like(sizes)
    scales = sizes.clamp_min(RELATIVE_FLOOR * largest) ** power
    return scales / scales.log().mean().exp()
