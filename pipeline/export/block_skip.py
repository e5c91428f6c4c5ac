"""The custom op: what is traced for a factored layer, and the function body that specifies it.

    BlockSkipLinear(x, a, b):               y = (x1 + x2 a) b,  [x1 x2] = x
    BlockSkipLinearIndexed(x, a, b, index): the same on Gather(x, index), on the last axis

x [..., n], a [n - r, r] = A'^T, b [r, m] = B'^T, index int32 [n], y [..., m]. Two names rather than
an optional input, because a function body cannot leave an input out, and because TensorRT's parser
looks functions up by name alone. A bias is an Add behind the node.
"""

from __future__ import annotations

import onnx
import onnx.parser
import onnx_ir as ir

DOMAIN = "skipcat"
VERSION = 1
PLAIN, INDEXED = "BlockSkipLinear", "BlockSkipLinearIndexed"
# What TensorRT looks for in its plugin registry; without the plugin it takes the function body.
PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}


def is_block_skip(node: ir.Node) -> bool:
    """Whether a node is one of the two ops."""
    return node.domain == DOMAIN and node.op_type in (PLAIN, INDEXED)


BODY = """
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
    """The two ops as ONNX functions over the default domain, by op type."""
    plain = BODY.format(opset=opset)
    indexed = plain.replace(f"{PLAIN} (x, a, b)", f"{INDEXED} (x, a, b, index)").replace(
        "x1, x2 = Split <axis = -1> (x, widths)",
        "ordered = Gather <axis = -1> (x, index)\n    x1, x2 = Split <axis = -1> (ordered, widths)",
    )
    protos = [onnx.parser.parse_function(text) for text in (plain, indexed)]
    return {proto.name: ir.serde.deserialize_function(proto) for proto in protos}
