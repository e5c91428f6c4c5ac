"""The exporter is made quick where that changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest
from onnxscript.rewriter.pattern import RewriteRule, SimplePatternMatcher

from pipeline.export.tracing import _match

GRAPH = ir.from_onnx_text(
    """
    <ir_version: 10, opset_import: ["": 20, "own": 1]>
    pairs (float[4] x) => (float[4] c, float[4] d, float[4] e) {
        a = Relu(x)
        b = own.Relu(a)
        c = Abs(x)
        d = Abs(b)
        e = Neg(a)
    }
    """
)


def two_outputs(op: Any, x: Any) -> tuple[Any, Any]:
    return op.Relu(x), op.Abs(x)


def two_of_another_domain(op: Any, x: Any) -> tuple[Any, Any]:
    return op.Relu(x, _domain="own"), op.Neg(x)


def one_output(op: Any, x: Any) -> Any:
    return op.Neg(op.Relu(x))


def found(pattern: Callable[..., Any], match: Callable[..., Any]) -> list[list[str]]:
    """Names of the nodes that a pattern is found in, from each node of the graph on."""
    rule = RewriteRule(pattern, lambda op, **_: None)
    matcher, graph = rule._matcher, GRAPH.graph
    results = [match(matcher, GRAPH, graph, node, remove_nodes=False) for node in graph]
    return [sorted(n.outputs[0].name for n in r.nodes) if r else [] for r in results]


@pytest.mark.parametrize("pattern", [two_outputs, two_of_another_domain, one_output])
def test_patterns_are_found_where_onnxscript_finds_them(pattern: Callable[..., Any]) -> None:
    expected = found(pattern, SimplePatternMatcher.match)
    assert found(pattern, _match) == expected
    assert any(expected)
