"""`skipcat::block_skip_linear_quantized`: the layer of matrices that are codes, of 8 or 4 bits.

    y = (x1 + x2 a) b,  [x1 x2] = x[..., index],  or, without a,  y = x b

The tensors are those of the ops BlockSkipLinearA4B8 and LinearQuantized4 in ONNX. On a GPU it is
the kernel of `trt_plugins/block_skip`, which reads the codes as they are; on the CPU the matrices
are written out as numbers. Only for inference: codes have no gradient.
"""

from __future__ import annotations

import torch

from pipeline.kernels.op import Held, launch, mix

_HALF = 4  # bits of half a byte
_FORMS = (0, _HALF, 8)


@torch.library.custom_op(
    "skipcat::block_skip_linear_quantized", mutates_args=(), device_types="cpu"
)
def block_skip_linear_quantized(
    x: torch.Tensor,
    a: torch.Tensor | None,
    a_scale: torch.Tensor | None,
    b: torch.Tensor,
    b_scale: torch.Tensor | None,
    index: torch.Tensor | None,
    bits: list[int],
    blocks: list[int],
) -> torch.Tensor:
    """Compute the layer.

    Args:
        x: inputs, [..., n].
        a: A' transposed, numbers [n - r, r] of the type of x, or codes; None for a dense layer.
        a_scale: of codes, of the type of x, a row for each block of rows.
        b: B' transposed, [r, m], likewise.
        b_scale: likewise.
        index: int32 [n], the order of the inputs with the r pivots first; None when x has it.
        bits: of the codes of a and of b; 0 for numbers.
        blocks: rows of each that share a scale, multiples of 16; 0 for numbers.

    Returns:
        [..., m], of the type of x.

    Raises:
        ValueError: shapes or types that do not fit.
        InputError: on a GPU, the kernels cannot be compiled, or refuse the layer.
    """
    held_a, held_b = _require_fit(x, a, a_scale, b, b_scale, index, bits, blocks)
    matrix = _numbers(held_b, x.dtype)
    if held_a is not None:
        x, _ = mix(x, _numbers(held_a, x.dtype), index)
    elif index is not None:
        x = x.index_select(-1, index)
    return x @ matrix


@block_skip_linear_quantized.register_fake
def _shape_of_result(
    x: torch.Tensor,
    a: torch.Tensor | None,
    a_scale: torch.Tensor | None,
    b: torch.Tensor,
    b_scale: torch.Tensor | None,
    index: torch.Tensor | None,
    bits: list[int],
    blocks: list[int],
) -> torch.Tensor:
    """An empty result: what compilers ask for."""
    _, held = _require_fit(x, a, a_scale, b, b_scale, index, bits, blocks)
    return x.new_empty((*x.shape[:-1], _width(held)))


@block_skip_linear_quantized.register_kernel("cuda")
def _launch(
    x: torch.Tensor,
    a: torch.Tensor | None,
    a_scale: torch.Tensor | None,
    b: torch.Tensor,
    b_scale: torch.Tensor | None,
    index: torch.Tensor | None,
    bits: list[int],
    blocks: list[int],
) -> torch.Tensor:
    """The kernel, on the current stream of x's device."""
    held_a, held_b = _require_fit(x, a, a_scale, b, b_scale, index, bits, blocks)
    return launch(x, held_a, held_b, index, _width(held_b))


def _width(held: Held) -> int:
    """Columns of a matrix, which scales know and half bytes do not."""
    return (held.stored if held.scale is None else held.scale).shape[1]


def _numbers(held: Held, dtype: torch.dtype) -> torch.Tensor:
    """A matrix in a type: each number its code times its scale, rounded once."""
    if held.scale is None:
        return held.stored
    codes = held.stored
    if held.bits == _HALF:
        codes = torch.stack(_halves(codes), dim=-1).flatten(1)[:, : _width(held)]
    return _scaled(codes, held.scale, held.block).to(dtype)


def columns_of(
    stored: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
    block: int,
    places: torch.Tensor,
    rests: torch.Tensor | None = None,
) -> torch.Tensor:
    """Some columns of a matrix of codes, as rows.

    Args:
        stored: codes of [n, m], as the operator takes them.
        scale: of its blocks.
        bits: of a code.
        block: rows that share a scale.
        places: int64 [k].
        rests: what each number of a block has beyond its code times its scale, as scales are held.

    Returns:
        [k, n], of the type of the scales.
    """
    if bits == _HALF:
        low, high = _halves(stored[:, places // 2])
        codes = torch.where(places % 2 == 0, low, high)
    else:
        codes = stored[:, places]
    numbers = _scaled(codes, scale[:, places], block)
    if rests is not None:
        numbers = (
            numbers + rests[:, places].to(numbers.dtype).repeat_interleave(block, 0)[: len(codes)]
        )
    return numbers.to(scale.dtype).T.contiguous()


def _halves(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The signed numbers in the lower and the upper halves of int8."""
    # The lower half moves up, and both come down with their signs.
    return (codes << 4) >> 4, codes >> 4


def _scaled(codes: torch.Tensor, scale: torch.Tensor, block: int) -> torch.Tensor:
    """Codes [n, m] times the scales of their blocks, in float32 or what is wider."""
    wide = torch.promote_types(scale.dtype, torch.float32)
    scales = scale.to(wide).repeat_interleave(block, 0)[: len(codes)]
    return codes.to(wide) * scales


def _require_fit(
    x: torch.Tensor,
    a: torch.Tensor | None,
    a_scale: torch.Tensor | None,
    b: torch.Tensor,
    b_scale: torch.Tensor | None,
    index: torch.Tensor | None,
    bits: list[int],
    blocks: list[int],
) -> tuple[Held | None, Held]:
    """Both matrices; raise ValueError when shapes or types do not fit."""
    if x.dim() == 0 or len(bits) != 2 or len(blocks) != 2:
        raise ValueError("x needs a dimension, and bits and blocks are for a and b")
    n = x.shape[-1]
    if index is not None and (index.shape != x.shape[-1:] or index.dtype != torch.int32):
        raise ValueError(f"index must be int32 [{n}], not {index.dtype} {tuple(index.shape)}")
    held_b = _held("b", b, b_scale, bits[1], blocks[1], x.dtype)
    if a is None:
        if b.shape[0] != n:
            raise ValueError(f"b has {b.shape[0]} rows, and x {n} columns")
        return None, held_b
    held_a = _held("a", a, a_scale, bits[0], blocks[0], x.dtype)
    if _width(held_a) != b.shape[0] or a.shape[0] + b.shape[0] != n:
        raise ValueError(
            f"a {tuple(a.shape)} and b {tuple(b.shape)} do not fit {n} inputs: "
            "a [n - r, r], b [r, m]"
        )
    return held_a, held_b


def _held(
    name: str,
    stored: torch.Tensor,
    scale: torch.Tensor | None,
    bits: int,
    block: int,
    dtype: torch.dtype,
) -> Held:
    """One matrix; raise ValueError unless its tensors are what its bits and block say."""
    if bits not in _FORMS or (bits > 0) != (scale is not None) or stored.dim() != 2:
        raise ValueError(f"{name}: {bits} bits, where 4 and 8 have scales and 0 has none")
    numbers = stored if scale is None else scale
    if numbers.dtype != dtype or (bits > 0 and stored.dtype != torch.int8):
        raise ValueError(f"{name} is of {numbers.dtype}, and x of {dtype}; codes are int8")
    if not (stored.is_contiguous() and numbers.is_contiguous()):
        raise ValueError(f"{name} must be contiguous")
    if scale is not None:
        width = -(-scale.shape[1] * bits // 8)
        groups = -(-stored.shape[0] // block) if block >= 16 else -1
        if stored.shape[1] != width or scale.shape[0] != groups or block % 16:
            raise ValueError(
                f"{name}: codes {tuple(stored.shape)} of {bits} bits and scales "
                f"{tuple(scale.shape)} do not fit blocks of {block} rows"
            )
    return Held(stored, scale, bits, block)
