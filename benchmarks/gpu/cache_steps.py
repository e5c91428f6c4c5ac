"""A step over attention to latents: errors first, then its speed at 32k places beside dense caches.

Ways take turns; a time is the median of rounds, each one replay of a CUDA graph of many calls over
several copies of the cache, three times the GPU's own together. Head width 128, half of it removed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.block_skip_ways import Stopwatch, Way
from benchmarks.gpu.cache_layer import CacheCall, CacheKernels, CacheShape, measure_cache_errors
from benchmarks.gpu.random_errors import BOUNDS, error_rows
from benchmarks.gpu.steps import Row, Setting, verdict, within

_NARROW = CacheShape(32, 8, 1, 32768, key_rank=64, value_rank=64, width=64)
_TINY = CacheShape(4, 2, 1, 200, key_rank=32, value_rank=32, width=32)
_ERROR_BATCHES, _ERROR_CASES = 6, 20
_LEAST_SHARE, _LEAST_OVER_DENSE = 0.8, 1.3
_QUERIES = 4  # of a draft that is verified
_ENOUGH_S = 6.0  # a row that is begun later than this before the end would be lost


def latent_attention(setting: Setting) -> Iterator[Row]:
    """Random caches against float64, then narrow and rebuilt forms at 32k places."""
    kernels = CacheKernels(setting.device)
    batches, cases = (_ERROR_BATCHES, _ERROR_CASES) if setting.on_gpu else (1, 6)
    measure = partial(measure_cache_errors, kernels)
    yield from error_rows("caches", measure, batches, cases, setting, _ENOUGH_S)
    random = torch.Generator(setting.device).manual_seed(setting.seed)
    watch = Stopwatch(setting.device, 15 if setting.on_gpu else 1)
    for name, row in _speed_rows(kernels, watch, random, setting):
        if name not in setting.done and setting.left_s >= _ENOUGH_S:
            yield name, row()


def _speed_rows(
    kernels: CacheKernels, watch: Stopwatch, random: torch.Generator, setting: Setting
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Names of rows, and what measures each; what is judged comes first."""
    narrow = _NARROW if setting.on_gpu else _TINY
    dense = replace(
        narrow, key_rank=2 * narrow.key_rank, value_rank=2 * narrow.value_rank,
        width=2 * narrow.width,
    )  # fmt: skip
    rebuilt = replace(narrow, rebuilt=True, width=dense.width)

    def of_bits(shape: CacheShape, bits: int) -> CacheShape:
        return replace(shape, key_bits=bits, value_bits=bits)

    def row(shape: CacheShape, judged: bool) -> Callable[[], dict[str, Any]]:
        return lambda: _row(kernels, shape, dense, watch, random, setting, judged)

    yield "narrow, 16 bits", row(narrow, True)
    yield "rebuilt, 16 bits", row(rebuilt, True)
    for bits in (8, 4):
        yield f"narrow, {bits} bits", row(of_bits(narrow, bits), True)
    for bits in (8, 4):
        yield f"rebuilt, {bits} bits", row(of_bits(rebuilt, bits), False)
    for form, shape in (("narrow", narrow), ("rebuilt", rebuilt)):
        several = replace(shape, queries=_QUERIES)
        yield f"{form}, 16 bits, {_QUERIES} queries", row(several, False)


def _our_way(
    kernels: CacheKernels, shape: CacheShape, watch: Stopwatch, random: torch.Generator, name: str
) -> tuple[Way, float]:
    """Our kernels on copies of a cache, and the error of the first."""
    read_bytes = shape.read_bytes()
    calls = [CacheCall(shape, kernels.where, random) for _ in range(watch.copies(read_bytes))]
    prepared = [kernels.prepare(call) for call in calls]
    prepared[0]()
    return Way(name, read_bytes, list(prepared), []), calls[0].error()


def _torch_ways(shape: CacheShape, watch: Stopwatch, random: torch.Generator) -> list[Way]:
    """PyTorch's attention to a cache of float16: by its grouped heads, and with a group's as rows.

    The rows of a group see the same places as long as there is one query.
    """
    grouped: list[Callable[[], object]] = []
    rows: list[Callable[[], object]] = []

    def drawn(*size: int) -> torch.Tensor:
        made = torch.randn(size, generator=random, device=random.device)
        return made.to(shape.dtype)

    for _ in range(watch.copies(shape.read_bytes())):
        query = drawn(1, shape.heads, shape.queries, shape.width)
        keys = drawn(1, shape.kv_heads, shape.places, shape.key_rank)
        values = drawn(1, shape.kv_heads, shape.places, shape.value_rank)
        grouped.append(_attention(query, keys, values, enable_gqa=True))
        by_group = query.reshape(1, shape.kv_heads, -1, shape.width)
        rows.append(_attention(by_group, keys, values, enable_gqa=False))
    ways = [Way("torch, grouped heads", shape.read_bytes(), grouped, [])]
    if shape.queries == 1:
        ways.append(Way("torch, heads as rows", shape.read_bytes(), rows, []))
    return ways


def _attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, enable_gqa: bool
) -> Callable[[], object]:
    return lambda: scaled_dot_product_attention(query, keys, values, enable_gqa=enable_gqa)


def _row(
    kernels: CacheKernels, shape: CacheShape, dense: CacheShape, watch: Stopwatch,
    random: torch.Generator, setting: Setting, judged: bool,
) -> dict[str, Any]:  # fmt: skip
    """One form beside dense caches of 16 bits: ours, and PyTorch's, whose faster way counts."""
    dense = replace(dense, queries=shape.queries)
    ours, error = _our_way(kernels, shape, watch, random, "ours")
    own, own_error = _our_way(kernels, dense, watch, random, "ours, dense")
    ways = [ours, own, *_torch_ways(dense, watch, random)]
    watch.time(ways)
    us = {way.name: statistics.median(way.us) for way in ways}
    share = ours.read_bytes / us["ours"] * 1e6 / setting.bytes_per_s
    torch_us = min(taken for name, taken in us.items() if name.startswith("torch"))
    judged = judged and setting.on_gpu
    over = judged and shape.rebuilt
    # `max` would pass over a NaN.
    worst = error + own_error if math.isnan(error + own_error) else max(error, own_error)
    verdicts = [
        within("error against float64", worst, BOUNDS[shape.dtype]),
        verdict("share of the copy bandwidth", share, _LEAST_SHARE, judged and not shape.rebuilt),
        verdict("over our dense form", us["ours, dense"] / us["ours"], _LEAST_OVER_DENSE, over),
        verdict("over torch's dense", torch_us / us["ours"], _LEAST_OVER_DENSE, over),
    ]
    ratio = us["ours, dense"] / us["ours"]
    told = {way.name: {"us": us[way.name], "spread_us": [min(way.us), max(way.us)]} for way in ways}
    says = f"{us['ours']:.1f} us, {share:.2f} of a copy, {ratio:.2f} x our dense form"
    described = {**vars(shape), "dtype": str(shape.dtype).removeprefix("torch.")}
    return {"says": says, "cache": described, "read_bytes": ours.read_bytes, "ways": told} | {
        "errors": {"ours": error, "ours, dense": own_error}, "verdicts": verdicts,
    }  # fmt: skip
