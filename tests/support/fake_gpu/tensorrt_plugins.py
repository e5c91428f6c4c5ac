"""Plugins of the fake TensorRT: what a library brings, and what its kernels compute.

A graph for TensorRT 10.3 has no body for an op that the plugin takes, and ONNX Runtime computes the
plan. So the fake has bodies of its own, written apart from those of the product.
"""

from __future__ import annotations

from typing import Any

# The cache: what is before the new tokens, they, what is behind them. All rows of a batch begin at
# one place, as sessions have it; where they do not, the answer is wrong.
_KERNELS = {
    "BlockSkipLinear": """<domain: "skipcat", opset_import: ["" : {opset}]>
BlockSkipLinear (x, a, b) => (y)
{{
    origin = Constant <value_ints: ints = [0]> ()
    axis = Constant <value_ints: ints = [-1]> ()
    rank = Shape <start = 0, end = 1> (b)
    width = Shape <start = -1> (x)
    left = Slice (x, origin, rank, axis)
    right = Slice (x, rank, width, axis)
    kept = MatMul (left, b)
    mixed = MatMul (right, a)
    rest = MatMul (mixed, b)
    y = Add (kept, rest)
}}
""",
    "CacheWrite": """<domain: "skipcat", opset_import: ["" : {opset}]>
CacheWrite (past, new, first) => (present)
{{
    origin = Constant <value_ints: ints = [0]> ()
    axis = Constant <value_ints: ints = [2]> ()
    lowest = ReduceMin <keepdims = 0> (first)
    highest = ReduceMax <keepdims = 0> (first)
    alike = Sub (highest, lowest)
    same = Cast <to = 7> (alike)
    place = Cast <to = 7> (lowest)
    flat = Constant <value_ints: ints = [1]> ()
    start = Reshape (place, flat)
    apart = Reshape (same, flat)
    begin = Add (start, apart)
    tokens = Shape <start = 2, end = 3> (new)
    stop = Add (begin, tokens)
    slots = Shape <start = 2, end = 3> (past)
    before = Slice (past, origin, begin, axis)
    behind = Slice (past, stop, slots, axis)
    present = Concat <axis = 2> (before, new, behind)
}}
""",
}


class Creator:
    """A plugin that a library brings."""

    def __init__(self, name: str) -> None:
        self.name, self.plugin_version, self.plugin_namespace = name, "1", "skipcat"


class IPluginRegistry:
    """Libraries of the fake hold the names of their plugins, a line each, behind `plugins:`."""

    def __init__(self) -> None:
        self.all_creators: list[Creator] = []

    def load_library(self, plugin_path: str) -> object | None:
        with open(plugin_path, encoding="utf-8", errors="replace") as file:
            first, *names = file.read().split()
        if first != "plugins:":
            return None
        self.all_creators += [Creator(name) for name in names]
        return object()


def with_kernels(graph: bytes) -> bytes:
    """A graph with a body for every op that a plugin of the fake takes and that has none."""
    import onnx
    import onnx.parser

    model: Any = onnx.load_from_string(graph)
    bodies = {function.name for function in model.functions}
    missing = {node.op_type for node in model.graph.node} & {*_KERNELS} - bodies
    opset = next(o.version for o in model.opset_import if not o.domain)
    for name in missing:
        text = _KERNELS[name].format(opset=opset)
        model.functions.append(onnx.parser.parse_function(text))
    return model.SerializeToString() if missing else graph
