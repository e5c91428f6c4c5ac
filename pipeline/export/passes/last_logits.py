"""The head works on the tokens whose logits are wanted, not on all of them.

Linear(x, head) -> Linear(Slice(x, first_logit, end, axis 1), head)

`first_logit` is an input of the graph with a default, 0: all tokens, as other runtimes expect. A
runtime that reads a prompt gives -1, and the head's share of the work, a fifth in small models, is
done once instead of for every token.
"""

from __future__ import annotations

import logging

import numpy as np
import onnx_ir as ir

from pipeline.export.contract import FIRST_LOGIT
from pipeline.export.passes.lay_out import is_linear
from pipeline.export.passes.weights import new_constant

_logger = logging.getLogger(__name__)
_END = np.iinfo(np.int64).max


def choose_first_logit(model: ir.Model) -> bool:
    """Add the input and the Slice in place; False where no linear layer ends in the logits."""
    graph = model.graph
    head = _head(graph.outputs[0])
    if head is None:
        _logger.debug("all logits are computed: no linear layer ends in them")
        return False
    first = ir.Value(
        name=FIRST_LOGIT, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.tensor([0], dtype=ir.DataType.INT64, name=FIRST_LOGIT),
    )  # fmt: skip
    graph.inputs.append(first)
    graph.register_initializer(first)
    end = new_constant(graph, "logits.end", np.array([_END], np.int64))
    axis = new_constant(graph, "logits.axis", np.array([1], np.int64))
    x = head.inputs[0]
    cut = ir.node("Slice", [x, first, end, axis], name="logits.wanted")
    kept = cut.outputs[0]
    kept.name, kept.type = "logits.wanted.output", x.type
    kept.shape = ir.Shape([x.shape[0], "logits_length", x.shape[2]])
    graph.insert_before(head, cut)
    head.replace_input_with(0, kept)
    _rename_length(head.outputs[0])
    return True


def _head(logits: ir.Value) -> ir.Node | None:
    """The linear layer behind the logits, with nothing but scalars' arithmetic between."""
    node = logits.producer()
    while node is not None and not is_linear(node):
        activations = [v for v in node.inputs if v is not None and v.const_value is None]
        if len(activations) != 1 or activations[0].shape != logits.shape:
            return None
        node = activations[0].producer()
    return node


def _rename_length(value: ir.Value) -> None:
    """Let the shapes from the head to the logits say that their length is one of its own."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        value.shape = ir.Shape([value.shape[0], "logits_length", *list(value.shape)[2:]])
        waiting += [output for user, _ in value.uses() for output in user.outputs]
