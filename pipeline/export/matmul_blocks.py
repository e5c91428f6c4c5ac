"""The custom ops of products with low-bit codes on the CPU, and the bodies that specify them.

    MatMulBlocks(x, codes, scales)                       y = x W^T,  w = (code - middle) scale
    MatMulBlocksZeros(x, codes, scales, zeros)           w = (code - zero) scale
    MatMulBlocksRests(x, codes, scales, rests, ones)     w = (code - middle) scale + rest
    ...Bias(..., bias)                                   y = x W^T + bias
    BlockSkipBlocksAZerosBRests[Indexed](x, [index,] A..., B...)
                                                         y = (x1 + x2 A^T) B^T,  [x1 x2] = x
    LookUpBlocks[Zeros](ids, codes, scales[, zeros])     y = W[ids]

x [..., K], y [..., N]; codes, scales and zeros as ONNX Runtime's MatMulNBits has them, with its
attributes K, N, bits and block_size; rests [blocks, N], one to a block; ones [K, blocks] are 1
where a column is in a block. A is [rank, rest] and B [N, rank], each with bits and a block size of
its own; index, int32 [rank + rest], puts x in order. ids, int64 [B, S], are of rows; scales and
zeros are there [N, blocks, 1], one to an element, as ONNX Runtime's GatherBlockQuantized has them.
Where the kernels of `ort_plugins/matmul_blocks` are registered, they take the node; elsewhere ONNX
Runtime puts the body in its place. Names instead of optional inputs, as those of block skip.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx.parser
import onnx_ir as ir

from pipeline.export.contract import (
    BLOCK_A,
    BLOCK_B,
    BLOCK_SKIP_BLOCKS_OPS,
    CONTRIB,
    DOMAIN,
    GATHER_NBITS,
    INTEGER,
    LOOK_UP_BLOCKS_OPS,
    MATMUL_BLOCKS_OPS,
    MATMUL_NBITS,
    PRODUCTS,
)

_OWN_SIZES = {"K": "K", "N": "N", "bits": "bits", "block_size": "block_size"}
_SIZES_OF_A = {"K": "rest", "N": "rank", "bits": "bits_a", "block_size": BLOCK_A}
_SIZES_OF_B = {"K": "rank", "N": "N", "bits": "bits_b", "block_size": BLOCK_B}
_KINDS = {
    "sym": ("codes", "scales"),
    "asym": ("codes", "scales", "zeros"),
    "offset": ("codes", "scales", "rests", "ones"),
}
_SPLIT = """
one = Constant <value_ints: ints = [1]> ()
rank_number = Constant <value_int: int = @rank> ()
rest_number = Constant <value_int: int = @rest> ()
rank = Reshape (rank_number, one)
rest = Reshape (rest_number, one)
widths = Concat <axis = 0> (rank, rest)
x1, x2 = Split <axis = -1> ({x}, widths)
"""
_ROWS = f"""
blocks = {CONTRIB}.{GATHER_NBITS} <bits: int = @bits, block_size: int = @block_size, \
gather_axis = 0, quantize_axis = 2> ({{table}})
row = Constant <value_ints: ints = [0, 0, -1]> ()
whole = Reshape (blocks, row)
one = Constant <value_ints: ints = [1]> ()
start = Constant <value_ints: ints = [0]> ()
axis = Constant <value_ints: ints = [2]> ()
width = Constant <value_int: int = @K> ()
end = Reshape (width, one)
y = Slice (whole, start, end, axis)
"""


def function_bodies(opset: int, used: Collection[str]) -> dict[str, ir.Function]:
    """The ops of some names as ONNX functions over ONNX Runtime's own, by op type."""
    texts = {name: text for name, text in _texts(opset).items() if name in used}
    protos = {name: onnx.parser.parse_function(text) for name, text in texts.items()}
    return {name: ir.serde.deserialize_function(proto) for name, proto in protos.items()}


def _texts(opset: int) -> dict[str, str]:
    """Every op's body, by its name."""
    products = {
        name: _function(
            opset,
            name,
            _OWN_SIZES.values(),
            ["x", *_KINDS[zero], *(["bias"] if bias else [])],
            _product("y", "x", _OWN_SIZES, zero, "", bias),
        )
        for (zero, bias), name in MATMUL_BLOCKS_OPS.items()
    }
    skips = {
        name: _block_skip(opset, name, a, b, indexed)
        for (a, b, indexed), name in BLOCK_SKIP_BLOCKS_OPS.items()
    }
    look_ups = {name: _look_up(opset, name, zero) for zero, name in LOOK_UP_BLOCKS_OPS.items()}
    return products | skips | look_ups


def _look_up(opset: int, name: str, zero: str) -> str:
    inputs = ["ids", *_KINDS[zero]]
    table = ", ".join(["codes", "ids", *_KINDS[zero][1:]])
    return _function(opset, name, _OWN_SIZES.values(), inputs, [_ROWS.format(table=table)])


def _block_skip(opset: int, name: str, a: str, b: str, indexed: bool) -> str:
    kinds = [f"a_{kind}" for kind in _KINDS[a]] + [f"b_{kind}" for kind in _KINDS[b]]
    lines = ["ordered = Gather <axis = -1> (x, index)"] if indexed else []
    lines += [
        _SPLIT.format(x="ordered" if indexed else "x"),
        *_product("mixed", "x2", _SIZES_OF_A, a, "a_", False),
        "z = Add (x1, mixed)",
        *_product("y", "z", _SIZES_OF_B, b, "b_", False),
    ]
    sizes = dict.fromkeys((*_SIZES_OF_A.values(), *_SIZES_OF_B.values()))
    return _function(opset, name, sizes, ["x", *(["index"] if indexed else []), *kinds], lines)


def _product(
    y: str, x: str, sizes: Mapping[str, str], zero: str, prefix: str, bias: bool
) -> list[str]:
    """Lines that compute one product: MatMulNBits, what rests add, and the bias."""
    attributes = ", ".join(f"{name}: int = @{own}" for name, own in sizes.items())
    node = f"{CONTRIB}.{MATMUL_NBITS} <{attributes}, accuracy_level = {PRODUCTS[INTEGER]}>"
    codes, scales, *more = (prefix + kind for kind in _KINDS[zero])
    if zero != "offset":
        optional = [more[0] if more else "", "", "bias"] if bias else more
        return [f"{y} = {node} ({', '.join([x, codes, scales, *optional])})"]
    rests, ones = more
    return [
        f"{prefix}product = {node} ({x}, {codes}, {scales})",
        f"{prefix}sums = MatMul ({x}, {ones})",
        f"{prefix}rest = MatMul ({prefix}sums, {rests})",
        f"{f'{prefix}whole' if bias else y} = Add ({prefix}product, {prefix}rest)",
        *([f"{y} = Add ({prefix}whole, bias)"] if bias else []),
    ]


def _function(
    opset: int, name: str, sizes: Collection[str], inputs: list[str], lines: list[str]
) -> str:
    return (
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}, "{CONTRIB}" : 1]>\n'
        f"{name} <{', '.join(sizes)}> ({', '.join(inputs)}) => (y)\n"
        "{\n" + "\n".join(lines) + "\n}\n"
    )
