"""Primitives to single operators, with onnxscript's own rules; and each computation once.

w * x * (mean(x^2) + eps)^-1/2        -> RMSNormalization(x, w)
x * cos + rotate_half(x) * sin        -> RotaryEmbedding(x, cos, sin)

A norm's input and gain are brought to one type, for ONNX's own type inference knows no other norm:
models in half precision whose gain is applied in float32 have two.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass
from onnxscript.rewriter import pattern

# Private modules, for there are no public ones: what onnxscript offers (rewriter.ort_fusions) goes
# to ONNX Runtime's own operators, and its rules for those of ONNX itself are in these alone.
from onnxscript.rewriter.rules.fusion._rms_normalization import fuse_rms_normalization
from onnxscript.rewriter.rules.fusion._rotary_embedding import (
    RotaryEmbedding23Fusion,
    _rotate_half_pattern,
    fuse_rotary_embedding,
)


class _HalfRotaryEmbedding(RotaryEmbedding23Fusion):
    """The library's rule, for models in half precision: cos and sin are rounded after Concat."""

    def pattern(
        self, op: Any, x: Any, freqs: Any, start1: Any, end1: Any, start2: Any, end2: Any,
        one1: Any, one2: Any, dtype: Any,
    ) -> Any:  # fmt: skip
        """Match x * cos + rotate_half(x) * sin with a Cast behind cos and sin."""
        repeated = op.Concat(freqs, freqs, axis=-1)
        cos = op.Unsqueeze(op.Cast(op.Cos(repeated), to=dtype), one1)
        sin = op.Unsqueeze(op.Cast(op.Sin(repeated), to=dtype), one2)
        return x * cos + _rotate_half_pattern(op, x, start1, end1, start2, end2) * sin

    def rewrite(self, op: Any, x: Any, freqs: Any, dtype: Any, **unused: Any) -> Any:
        """RotaryEmbedding on rounded cos and sin."""
        to = dtype.as_int()
        cos, sin = op.Cast(op.Cos(freqs), to=to), op.Cast(op.Sin(freqs), to=to)
        return op.RotaryEmbedding(x, cos, sin, interleaved=0, num_heads=x.shape[1])


_HALF_ROTARY = pattern.RewriteRuleSet([_HalfRotaryEmbedding.rule()])


def fuse_operators(model: ir.Model) -> dict[str, int]:
    """Apply the rules in place; return how often each did."""
    fused = {
        "RMSNormalization": fuse_rms_normalization(model),
        "RotaryEmbedding": fuse_rotary_embedding(model) + _HALF_ROTARY.apply_to_model(model),
    }
    for node in list(model.graph):
        if node.op_type == "RMSNormalization" and not node.domain:
            _bring_to_one_type(model.graph, node)
    return fused


def _bring_to_one_type(graph: ir.Graph, norm: ir.Node) -> None:
    """Where input and gain differ in type, let the norm have all in float32."""
    inputs, result = [v for v in norm.inputs if v is not None], norm.outputs[0]
    narrow = inputs[1].dtype  # a norm gives what its gain is in
    if len({value.dtype for value in inputs}) == 1:
        return
    for number, value in enumerate(inputs):
        if value.dtype != ir.DataType.FLOAT:
            widened = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
            widened.outputs[0].name = f"{result.name}.widened.{number}"
            widened.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            widened.outputs[0].shape = value.shape
            graph.insert_before(norm, widened)
            norm.replace_input_with(number, widened.outputs[0])
    if narrow == ir.DataType.FLOAT or narrow is None:
        return
    back = ir.node("Cast", [result], {"to": narrow})
    back.outputs[0].name = f"{result.name}.narrowed"
    back.outputs[0].type, back.outputs[0].shape = ir.TensorType(narrow), result.shape
    result.type = ir.TensorType(ir.DataType.FLOAT)
    graph.insert_after(norm, back)
    users = [use for use in result.uses() if use.node is not back]
    for user, number in users:
        user.replace_input_with(number, back.outputs[0])


def merge_duplicates(model: ir.Model) -> None:
    """Compute once, in place, what several nodes compute: a shared latent, cos and sin."""
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
