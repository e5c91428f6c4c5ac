"""What every tracer does: linear layers become nodes that compute nothing with their weights.

The exporter would transpose and fold the weights it sees, and here it sees stand-ins (see
`pipeline.checkpoint.skeleton`). `pipeline.export.passes.lay_out` turns the nodes into their final
form.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx_ir as ir
import torch
from onnxscript.rewriter import MatchResult
from onnxscript.rewriter.pattern import SimplePatternMatcher
from torch import nn

# Private modules, for there are no public ones: torch.onnx.export makes its registry by itself.
from torch.onnx._internal.exporter import _fx_passes
from torch.onnx._internal.exporter._registration import ONNXRegistry
from transformers import PreTrainedModel

from pipeline.checkpoint.modeling_skipcat import FactoredLinear
from pipeline.checkpoint.skeleton import QuantizedMatrix, Skeleton
from pipeline.errors import InputError
from pipeline.export.attention import ATTENTION
from pipeline.export.contract import BLOCK_SKIP_INDEXED, DOMAIN, OP_VERSION
from pipeline.export.decomposing import decomposed
from pipeline.export.int8_nodes import int8_as_nodes
from pipeline.export.passes.lay_out import LINEAR, TRACE_DOMAIN
from pipeline.export.passes.weights import StoredCodes

_Pass = Callable[[ir.Model], Mapping[str, int]]
_REGISTRY_OF = ONNXRegistry.from_torchlib
_MATCH = SimplePatternMatcher.match


@dataclass(frozen=True)
class Fusions:
    """Passes of one task's graphs alone; each says how often it did what.

    Attributes:
        traced: on the graph as it was traced.
        folded: once permutations are folded.
    """

    traced: tuple[_Pass, ...] = ()
    folded: tuple[_Pass, ...] = ()


@dataclass(frozen=True)
class Traced:
    """A graph, and what is particular to what the model is for.

    Attributes:
        graph: its matrices are read when it is saved.
        record: what `export.json` says of it beside what it says of any.
        write_files: writes what runtimes want beside the graph into a folder.
        fusions: passes of its own; None has none.
    """

    graph: ir.Model
    record: dict[str, Any]
    write_files: Callable[[Path], object]
    fusions: Fusions | None = None


def traced_graph(
    skeleton: Skeleton, step: nn.Module, inputs: tuple[Any, ...], rehearse: bool, **keywords: Any
) -> ir.Model:
    """Export a module that calls the skeleton's model, and give the graph the matrices it lacks.

    Args:
        skeleton: its matrices become those of the graph, named as in the checkpoint.
        step: has the model as its only child, `model`.
        inputs: to trace with.
        rehearse: call the step once before, without the exporter.
        keywords: of `torch.onnx.export`.

    Raises:
        InputError: the exporter cannot handle the model.
    """
    model = skeleton.model
    try:
        with _attending(model), _quiet_exporter(), torch.no_grad():
            if rehearse:
                step(*inputs)
            quick = patch.object(SimplePatternMatcher, "match", _match)
            once = patch.object(_fx_passes, "decompose_with_registry", decomposed)
            with _linears_as_nodes(), int8_as_nodes(model), _one_registry(), quick, once:
                program = torch.onnx.export(
                    step.eval(), inputs, dynamo=True, optimize=True, verify=False, **keywords
                )
    except Exception as error:
        raise InputError(
            "The model cannot be exported to ONNX.",
            where=type(model).__name__,
            observed=_own_reason(error),
            change="run again with -v to see the exporter's own traceback",
        ) from error
    graph: ir.Model = program.model  # type: ignore[union-attr]  # None without dynamo only
    _name_as_in_checkpoint(graph.graph)
    _attach_matrices(graph.graph, skeleton)
    return graph


def _own_reason(error: BaseException) -> str:
    """Why, in words of ours: what our attention refused, or that torch's exporter gave up.

    The exporter wraps what it meets, and its own words are for people who mend exporters.
    """
    root: BaseException | None = error
    while root is not None:
        if isinstance(root, NotImplementedError) and _raised_here(root):
            return str(root)
        error, root = root, root.__cause__ or root.__context__
    return f"torch's exporter does not get through the model's code ({type(error).__name__})"


def _raised_here(error: BaseException) -> bool:
    """Whether a file of ours raised it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and str(frames[-1].f_globals.get("__name__")).startswith("pipeline.")


def _name_as_in_checkpoint(graph: ir.Graph) -> None:
    """Drop the level that the traced wrapper adds to every weight's name."""
    weights = list(graph.initializers.values())
    graph.initializers.clear()
    for weight in weights:
        weight.name = weight.name.removeprefix("model.")
        graph.initializers[weight.name] = weight


def _attach_matrices(graph: ir.Graph, skeleton: Skeleton) -> None:
    """Replace every stand-in by the stored matrix, and make sure that none was computed with.

    Stand-ins are not numbers, nor is what is computed from one, whatever its size; what is computed
    from vectors, tables and sizes alone is right as it is.
    """
    for name, weight in graph.initializers.items():
        matrix = skeleton.matrices.get(name)
        if matrix is not None and tuple(weight.const_value.shape) == matrix.shape:
            weight.const_value = matrix.lazy_tensor(name)
            if isinstance(matrix, QuantizedMatrix):
                StoredCodes(matrix.format, matrix.codes).note_on(weight)
        else:
            _require_computed(name, weight.const_value, skeleton)
    for node in graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR:
                _require_computed(node.outputs[0].name, attribute.value, skeleton)


def _require_computed(name: str, constant: ir.TensorProtocol, skeleton: Skeleton) -> None:
    """Raise InputError for a constant that holds what a stand-in makes of it."""
    if constant.dtype.is_floating_point() and np.isnan(constant.numpy()).any():
        raise InputError(
            "The model cannot be exported to ONNX.",
            where=type(skeleton.model).__name__,
            observed=f"the exporter computed {name} from weights that are read only when the graph "
            "is written",
            expected="matrices that the model hands to its operators as they are",
        )


@contextlib.contextmanager
def _linears_as_nodes() -> Iterator[None]:
    """Inside, every linear layer is traced as one node, a factored one in skip form as its op.

    Weights enter as torch holds them: W [m, n]; `down` [r, n - r] and `up` [m, r].
    """
    with (
        patch.object(nn.Linear, "forward", _linear),
        patch.object(FactoredLinear, "forward", _factored),
    ):
        yield


def _one_registry() -> contextlib.AbstractContextManager[object]:
    """Inside, exports share torch's table of operators.

    It is the same for all, and to make it, sources of onnxscript are parsed each time: a tenth of
    the export of a small model. Translations of a caller's own are added to it, but ours has none.
    """
    return patch.object(ONNXRegistry, "from_torchlib", staticmethod(_registry))


@functools.cache
def _registry(opset_version: int) -> ONNXRegistry:
    return _REGISTRY_OF(opset_version=opset_version)


def _match(
    matcher: SimplePatternMatcher, model: ir.Model, graph: Any, node: ir.Node, **how: Any
) -> MatchResult:
    """As onnxscript matches, but where the node is of another operator than the pattern's first.

    For a pattern of several outputs it sorts all nodes of the graph before it looks at this one,
    which takes time by the square of their number.
    """
    outputs = matcher.pattern.output_nodes
    wanted = outputs[0].op_identifier() if len(outputs) > 1 else None
    if wanted is not None and wanted[:2] != node.op_identifier()[:2]:
        return MatchResult().fail("Another operator.")
    return _MATCH(matcher, model, graph, node, **how)


def _linear(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    y = _node(f"{TRACE_DOMAIN}::{LINEAR}", (x, self.weight), self.out_features)
    return y if self.bias is None else y + self.bias


def _factored(self: FactoredLinear, x: torch.Tensor) -> torch.Tensor:
    owner = self.owner
    if self.form != "skip":
        return self.up(owner.down(x))
    inputs = (x, owner.down.weight, self.up.weight, owner.permutation)
    y = _node(f"{DOMAIN}::{BLOCK_SKIP_INDEXED}", inputs, self.out_features)
    return y if self.up.bias is None else y + self.up.bias


def _node(name: str, inputs: tuple[torch.Tensor, ...], width: int) -> torch.Tensor:
    x = inputs[0]
    return torch.onnx.ops.symbolic(
        name, inputs, dtype=x.dtype, shape=(*x.shape[:-1], width), version=OP_VERSION
    )


@contextlib.contextmanager
def _attending(model: PreTrainedModel) -> Iterator[None]:
    """Trace with an attention of ours, and give the model its own back."""
    own = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep the exporter's progress prints and warnings off the user's screen."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
