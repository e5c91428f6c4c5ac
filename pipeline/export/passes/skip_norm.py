"""A residual sum and the norm behind it in one node.

s = a + b, RMSNormalization(s, w)  ->  SkipSimplifiedLayerNormalization(a, b, w), which gives s, too
"""

from __future__ import annotations

import logging

import onnx_ir as ir

from pipeline.export.contract import CONTRIB
from pipeline.export.passes.weights import shape_of

SKIP_NORM = "SkipSimplifiedLayerNormalization"
_logger = logging.getLogger(__name__)


def fuse_residual_norms(model: ir.Model) -> int:
    """Fuse in place wherever a norm's input is a sum of two activations; return how often."""
    fused = 0
    for node in list(model.graph):
        if node.op_type == "RMSNormalization" and not node.domain:
            reason = _fuse(model.graph, node)
            fused += reason is None
            if reason:
                _logger.debug("%s stays as it is: %s", node.name, reason)
    return fused


def _fuse(graph: ir.Graph, norm: ir.Node) -> str | None:
    """Fuse a norm with the sum before it, or say what stands in the way; both go unused."""
    total, gain = norm.inputs
    add = total.producer()
    if add is None or add.domain or add.op_type != "Add":
        return "its input is no sum"
    if norm.attributes.get_int("axis", -1) != -1 or len(total.shape or ()) != 3:
        return f"it is over axis {norm.attributes.get_int('axis', -1)} of {total.shape}"
    if any(v is None or v.shape != total.shape for v in add.inputs):
        return "its sum broadcasts"
    if len(shape_of(gain) or ()) != 1:
        return "its gain is not a constant vector"
    epsilon = norm.attributes.get_float("epsilon", 1e-5)
    both = ir.node(
        SKIP_NORM,
        [*add.inputs, gain],
        {"epsilon": epsilon},
        domain=CONTRIB,
        num_outputs=4,
        name=f"{gain.name}.{norm.outputs[0].name}",
    )
    graph.insert_before(add, both)
    for number, old in ((0, norm.outputs[0]), (3, total)):
        new = both.outputs[number]
        new.type, new.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new)
    for number, kind in ((0, "normed"), (3, "sum")):
        both.outputs[number].name = f"{both.name}.{kind}"
    for number in (1, 2):
        both.outputs[number].name = ""
    return None
