"""Attention to latents by the kernels, on shapes that were wrong on a GPU once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.gpu.cache_layer import CacheCall, CacheKernels, CacheShape
from benchmarks.gpu.random_errors import BOUNDS

# One side's latents are multiples of 16 bytes and numbers, the other's are not.
_NARROW = CacheShape(
    heads=8, kv_heads=2, queries=1, places=56, key_rank=238, value_rank=32, width=238,
    rebuilt=False, key_bits=4, value_bits=16, dtype=torch.bfloat16, closed=46,
)  # fmt: skip
_TWO_QUERIES = CacheShape(
    heads=42, kv_heads=7, queries=2, places=3, key_rank=88, value_rank=5, width=64,
    rebuilt=True, key_bits=16, value_bits=8, dtype=torch.float16, closed=1,
)  # fmt: skip
_REBUILT = CacheShape(
    heads=32, kv_heads=4, queries=1, places=4727, key_rank=158, value_rank=8, width=80,
    rebuilt=True, key_bits=4, value_bits=16, dtype=torch.float16, closed=1343,
)  # fmt: skip
_PLACES = [
    pytest.param("cpu", marks=pytest.mark.slow),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("where", _PLACES)
@pytest.mark.parametrize("shape", [_NARROW, _TWO_QUERIES, _REBUILT])
def test_one_aligned_side_beside_one_that_is_not_is_right(shape: CacheShape, where: str) -> None:
    if where == "cpu":  # emulated, thousands of places take minutes
        shape = replace(shape, places=min(shape.places, 327), closed=min(shape.closed, 143))
    call = CacheCall(shape, where, torch.Generator().manual_seed(0))
    CacheKernels(where).prepare(call)()
    assert call.error() <= BOUNDS[shape.dtype]
