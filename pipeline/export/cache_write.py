"""The custom op that writes new keys or values into a cache of fixed length, and its body.

    CacheWrite(past, new, first): present, past with new in the slots first ... first + S - 1

past and present [B, H, L, W], new [B, H, S, W], of one type; first int32 [B]. For opsets without
TensorScatter, whose meaning it has. A plugin of TensorRT 10.3 and newer writes into past itself
(`IPluginV3OneBuildV2::getAliasedInput`); the body makes a copy. TensorRT without the plugin is
given a graph whose cache grows (`pipeline/engine/growing_cache.py`).
"""

from __future__ import annotations

from collections.abc import Collection

import onnx.parser
import onnx_ir as ir
import torch

from pipeline.export.block_skip import PLUGIN_ATTRIBUTES
from pipeline.export.contract import CACHE_WRITE, DOMAIN, OP_VERSION

_BODY = """<domain: "{domain}", opset_import: ["" : {opset}]>
{name} (past, new, first) => (present)
{{
    zero = Constant <value_int: int = 0> ()
    one = Constant <value_int: int = 1> ()
    last = Constant <value_ints: ints = [-1]> ()
    behind = Constant <value_ints: ints = [1, 2, 3]> ()
    tokens = Shape <start = 2, end = 3> (new)
    count = Squeeze (tokens)
    places = Range (zero, count, one)
    column = Unsqueeze (places, last)
    starts = Cast <to = 7> (first)
    rows = Unsqueeze (starts, behind)
    slots = Add (rows, column)
    sizes = Shape (new)
    indices = Expand (slots, sizes)
    present = ScatterElements <axis = 2> (past, indices, new)
}}
"""


def cache_write(past: torch.Tensor, new: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """The node, while a graph is traced.

    Args:
        past: [B, H, L, W].
        new: [B, H, S, W].
        first: int [B], the slot of each row's first new token.
    """
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{CACHE_WRITE}",
        (past, new, first.to(torch.int32)),
        dict(PLUGIN_ATTRIBUTES),
        dtype=past.dtype,
        shape=past.shape,
        version=OP_VERSION,
    )


def function_bodies(opset: int, wanted: Collection[str]) -> dict[str, ir.Function]:
    """The op as an ONNX function over an opset, by op type, if it is wanted."""
    if CACHE_WRITE not in wanted:
        return {}
    text = _BODY.format(domain=DOMAIN, opset=opset, name=CACHE_WRITE)
    return {CACHE_WRITE: ir.serde.deserialize_function(onnx.parser.parse_function(text))}
