"""Primitives to single operators, with onnxscript's own rules; and each computation once.

w * x * (mean(x^2) + eps)^-1/2        -> RMSNormalization(x, w)
x * cos + rotate_half(x) * sin        -> RotaryEmbedding(x, cos, sin)
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
    return fused


def merge_duplicates(model: ir.Model) -> None:
    """Compute once, in place, what several nodes compute: a shared latent, cos and sin."""
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
