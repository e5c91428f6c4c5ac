"""Other programs' products with weights of 4 bits, on random data of their own.

torch       `_weight_int4pack_mm`, bfloat16, which came from tinygemm
gemlite     Triton kernels of github.com/mobiusml/gemlite, float16, tuned when first called
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.block_skip_layer import Layer
from benchmarks.gpu.block_skip_ways import Stopwatch, Way

_INNER_TILES = 8
_MIDDLE = 8  # the code that stands for zero


class Absent(Exception):
    """A program that is not here, or takes no such layer."""


def _codes(layer: Layer, random: torch.Generator) -> torch.Tensor:
    """uint8 [m, n] of 0 to 15."""
    shape = (layer.m, layer.n)
    return torch.randint(0, 16, shape, generator=random, device=random.device, dtype=torch.uint8)


def _scales(layer: Layer, random: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    """Positive [m, n / group]."""
    shape = (layer.m, layer.n // layer.group)
    drawn = torch.rand(shape, generator=random, device=random.device)
    return (0.001 + 0.001 * drawn).to(dtype)


def _error(x: torch.Tensor, y: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> float:
    """Relative Frobenius error against float64."""
    group = codes.shape[1] // scales.shape[1]
    numbers = (codes.double() - _MIDDLE) * scales.double().repeat_interleave(group, 1)
    exact = x.double() @ numbers.T
    return ((y.double() - exact).norm() / exact.norm()).item()


def _torch_way(layer: Layer, watch: Stopwatch, random: torch.Generator) -> tuple[Way, float]:
    """Torch's own product, y = x Wᵀ, and its error."""
    made = [_torch_call(layer, random) for _ in range(_copies(layer, watch))]
    calls: list[Callable[[], object]] = [call for call, _ in made]
    return Way("torch int4", layer.weight_bytes(), calls, []), made[0][1]


def _torch_call(layer: Layer, random: torch.Generator) -> tuple[Callable[[], torch.Tensor], float]:
    codes, scales = _codes(layer, random), _scales(layer, random, torch.bfloat16)
    x = torch.randn(layer.rows, layer.n, generator=random, device=random.device).bfloat16()
    # Of each group and output: the scale, and what the middle code stands for.
    pairs = torch.stack([scales.T, torch.zeros_like(scales.T)], dim=-1).contiguous()
    if random.device.type == "cpu":
        packed = torch._convert_weight_to_int4pack_for_cpu(codes.int(), _INNER_TILES)
        product = torch._weight_int4pack_mm_for_cpu
    else:
        # Two inputs to a byte, the even one in its upper half.
        bytes_ = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
        packed = torch._convert_weight_to_int4pack(bytes_, _INNER_TILES)
        product = torch._weight_int4pack_mm

    def call() -> torch.Tensor:
        return product(x, packed, layer.group, pairs)

    return call, _error(x, call(), codes, scales)


def _gemlite_way(layer: Layer, watch: Stopwatch, random: torch.Generator) -> tuple[Way, float]:
    """Gemlite's product, and its error.

    Raises:
        Absent: it is not installed, or there is no GPU.
    """
    if random.device.type != "cuda":
        raise Absent("its kernels need a GPU")
    try:
        from gemlite.helper import A16W4_HQQ_INT
    except ImportError as error:
        raise Absent(f"it is not installed: {error}") from error
    maker = A16W4_HQQ_INT(device="cuda", dtype=torch.float16)
    try:
        made = [_gemlite_call(maker, layer, random) for _ in range(_copies(layer, watch))]
    except Exception as error:  # of its own, or of a Triton that it does not know
        raise Absent(f"it fails: {str(error)[:300]}") from error
    calls: list[Callable[[], object]] = [call for call, _ in made]
    return Way("gemlite int4", layer.weight_bytes(), calls, []), made[0][1]


def _gemlite_call(
    maker: Any, layer: Layer, random: torch.Generator
) -> tuple[Callable[[], torch.Tensor], float]:
    codes, scales = _codes(layer, random), _scales(layer, random, torch.float16)
    x = torch.randn(layer.rows, layer.n, generator=random, device="cuda").half()
    product = maker.from_weights(codes, scales, torch.full_like(scales, _MIDDLE))

    def call() -> torch.Tensor:
        y: torch.Tensor = product(x)
        return y

    return call, _error(x, call(), codes, scales)


def _copies(layer: Layer, watch: Stopwatch) -> int:
    """Copies of the weights, beyond the cache together."""
    return watch.copies(layer.weight_bytes())


RIVALS: dict[str, Callable[[Layer, Stopwatch, torch.Generator], tuple[Way, float]]] = {
    "torch int4": _torch_way,
    "gemlite int4": _gemlite_way,
}
