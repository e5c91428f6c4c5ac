"""A cache of few bits without its rounding: what rounding does apart from what else may differ."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from pipeline.checkpoint.modeling_cache import cache_maps


@contextmanager
def unrounded_latents(model: nn.Module) -> Iterator[None]:
    """Inside, latents are cached as numbers."""
    bits = {made: made.bits for made in cache_maps(model).values()}
    for made in bits:
        made.bits = None
    try:
        yield
    finally:
        for made, own in bits.items():
            made.bits = own
