"""The custom op of products with low-bit codes on the CPU, and the body that specifies it.

    MatMulBlocks(x, codes, scales)                       y = x W^T,  w = (code - middle) scale
    MatMulBlocksZeros(x, codes, scales, zeros)           w = (code - zero) scale
    MatMulBlocksRests(x, codes, scales, rests, ones)     w = (code - middle) scale + rest
    ...Bias(..., bias)                                   y = x W^T + bias

x [..., K], y [..., N]; codes, scales and zeros as ONNX Runtime's MatMulNBits has them, with its
attributes K, N, bits and block_size; rests [blocks, N], one to a block; ones [K, blocks] are 1
where a column is in a block. Where the kernels of `ort_plugins/matmul_blocks` are registered, they
take the node; elsewhere ONNX Runtime puts the body in its place. Names instead of optional inputs,
as those of block skip.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx.parser
import onnx_ir as ir

from pipeline.export.contract import (
    CONTRIB,
    DOMAIN,
    INTEGER,
    MATMUL_BLOCKS_OPS,
    MATMUL_NBITS,
    PRODUCTS,
)

_SIZES = ("K", "N", "bits", "block_size")


def function_bodies(opset: int, used: Collection[str]) -> dict[str, ir.Function]:
    """The ops of some names as ONNX functions over ONNX Runtime's own, by op type."""
    texts = {
        name: _text(opset, name, zero, bias)
        for (zero, bias), name in MATMUL_BLOCKS_OPS.items()
        if name in used
    }
    protos = {name: onnx.parser.parse_function(text) for name, text in texts.items()}
    return {name: ir.serde.deserialize_function(proto) for name, proto in protos.items()}


def _text(opset: int, name: str, zero: str, bias: bool) -> str:
    """The body of one op: the product, what rests add, and the bias."""
    given = ["x", "codes", "scales"]
    attributes = ", ".join(f"{size}: int = @{size}" for size in _SIZES)
    product = f"{CONTRIB}.{MATMUL_NBITS} <{attributes}, accuracy_level = {PRODUCTS[INTEGER]}>"
    if zero == "offset":
        inputs = [*given, "rests", "ones"]
        lines = [
            f"product = {product} (x, codes, scales)",
            "sums = MatMul (x, ones)",
            "rest = MatMul (sums, rests)",
            f"{'whole' if bias else 'y'} = Add (product, rest)",
            *(["y = Add (whole, bias)"] if bias else []),
        ]
    else:
        inputs = given if zero == "sym" else [*given, "zeros"]
        optional = ["" if zero == "sym" else "zeros", "", "bias"] if bias else inputs[3:]
        lines = [f"y = {product} ({', '.join([*given, *optional])})"]
    inputs += ["bias"] if bias else []
    return (
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}, "{CONTRIB}" : 1]>\n'
        f"{name} <{', '.join(_SIZES)}> ({', '.join(inputs)}) => (y)\n"
        "{\n" + "\n".join(lines) + "\n}\n"
    )
