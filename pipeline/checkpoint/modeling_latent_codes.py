"""Latents in few bits: numbers of a token as codes of one step, and how one's error mends others'.

This file travels with every checkpoint whose cache is smaller and depends on torch alone. What a
code stands for is `codes * step + low`, whatever chose it.
"""

from __future__ import annotations

import torch


def codes_of(
    latent: torch.Tensor, bits: int, clip: float = 1.0, feedback: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents as codes of 2^bits steps of each token and group: latent = codes * step + low.

    With `feedback` the first h numbers are rounded, and the others once the errors of those were
    taken from them: where an error of one number can be undone by another, it is.

    Args:
        latent: [..., groups, S, rank].
        bits: of a code.
        clip: share of a token's range, about its middle, that the codes reach; the nearest code
            stands for what lies beyond.
        feedback: [groups, rank - h, h]; None rounds all alike.

    Returns:
        Codes [..., rank], 0 to 2^bits - 1; step and low [..., 1], which float16 holds exactly. All
        in the type of the latents.
    """
    least, most = latent.amin(-1, keepdim=True), latent.amax(-1, keepdim=True)
    if clip < 1:
        beyond = (1 - clip) / 2 * (most - least)
        least, most = least + beyond, most - beyond
    low = least.half().to(latent.dtype)
    # A step so small that float16 has it not would divide by zero; all is then the offset.
    step = ((most - low) / (2**bits - 1)).half().to(latent.dtype)
    if feedback is None:
        return _nearest(latent, step, low, bits), step, low
    first, second = latent.split([feedback.shape[-1], feedback.shape[-2]], dim=-1)
    leading = _nearest(first, step, low, bits)
    error = leading * step + low - first
    trailing = _nearest(second - error @ feedback.transpose(-1, -2), step, low, bits)
    return torch.cat([leading, trailing], dim=-1), step, low


def _nearest(
    latent: torch.Tensor, step: torch.Tensor, low: torch.Tensor, bits: int
) -> torch.Tensor:
    codes = ((latent - low) / step.clamp_min(torch.finfo(torch.float16).tiny)).round()
    return codes.clamp(0, 2**bits - 1)
