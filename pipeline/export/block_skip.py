"""The custom op: what is traced for a factored layer, and the function body that specifies it.

    BlockSkipLinear(x, a, b):               y = (x1 + x2 a) b,  [x1 x2] = x
    BlockSkipLinearIndexed(x, a, b, index): the same on Gather(x, index), on the last axis

x [..., n], a [n - r, r] = A'^T, b [r, m] = B'^T, index int32 [n], y [..., m]. Two names rather than
an optional input, because a function body cannot leave an input out, and because TensorRT's parser
looks functions up by name alone. A bias is an Add behind the node.

BlockSkipLinearFewBits and its Indexed form compute the same. Their a or b comes out of a
DequantizeLinear, and they have a name of their own because no plugin should take them: it would be
given numbers, written out of the codes before every product. The DequantizeLinear nodes are outside
the body: TensorRT's parser gives those of a body used twice the same name, and refuses the second.
"""

from __future__ import annotations

import onnx
import onnx.parser
import onnx_ir as ir

from pipeline.export.contract import (
    BLOCK_SKIP,
    BLOCK_SKIP_OPS,
    BLOCKED_OPSET,
    DOMAIN,
    OP_VERSION,
    QUANTIZED_SKIP,
)

# What TensorRT looks for in its plugin registry; without the plugin it takes the function body.
PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": str(OP_VERSION)}


def is_block_skip(node: ir.Node) -> bool:
    """Whether a node is one of the two ops whose factors are numbers."""
    return node.domain == DOMAIN and node.op_type in BLOCK_SKIP_OPS


_BODY = """
<domain: "skipcat", opset_import: ["" : {opset}]>
BlockSkipLinear (x, a, b) => (y)
{{
    rank = Shape <start = 0, end = 1> (b)
    rest = Shape <start = 0, end = 1> (a)
    widths = Concat <axis = 0> (rank, rest)
    x1, x2 = Split <axis = -1> (x, widths)
    mixed = MatMul (x2, a)
    z = Add (x1, mixed)
    y = MatMul (z, b)
}}
"""


def function_bodies(opset: int) -> dict[str, ir.Function]:
    """The ops that an opset can express, as ONNX functions over the default domain, by op type."""
    plain = _BODY.format(opset=opset)
    texts = [plain]
    if opset >= BLOCKED_OPSET:
        texts.append(plain.replace(BLOCK_SKIP, QUANTIZED_SKIP))
    protos = [onnx.parser.parse_function(t) for text in texts for t in (text, _indexed(text))]
    return {proto.name: ir.serde.deserialize_function(proto) for proto in protos}


def _indexed(text: str) -> str:
    """The body of the op whose last input says in which order it wants x."""
    name = QUANTIZED_SKIP if QUANTIZED_SKIP in text else BLOCK_SKIP
    return (
        text.replace(name, name + "Indexed", 1)
        .replace(") => (y)", ", index) => (y)")
        .replace(
            "x1, x2 = Split <axis = -1> (x, widths)",
            "ordered = Gather <axis = -1> (x, index)\n"
            "    x1, x2 = Split <axis = -1> (ordered, widths)",
        )
    )
