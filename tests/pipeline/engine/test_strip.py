from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.engine.network import parse_network
from pipeline.engine.onnx_folder import load_graph
from pipeline.engine.standard import parse_version, require_version
from pipeline.engine.strip import needs_stripping, write_stripped_graph
from pipeline.errors import InputError


@pytest.mark.parametrize(
    ("version", "registered", "expected"),
    [
        ("10.3.0", True, True),
        ("10.6.0.26", True, True),
        ("10.7.0", True, False),
        ("11.4.0.106", True, False),
        ("10.3.0", False, False),
    ],
)
def test_only_versions_that_prefer_the_function_need_stripping(
    version: str, registered: bool, expected: bool
) -> None:
    assert needs_stripping(parse_version(version), registered) is expected


def test_stripping_leaves_nodes_and_weights_and_takes_the_bodies(
    tiny_export: Path, tmp_path: Path
) -> None:
    source = tiny_export / "model.onnx"
    stripped = write_stripped_graph(source, tmp_path / "stripped")
    before, after = load_graph(source), load_graph(stripped)
    assert len(before.functions) == 1
    assert len(after.functions) == 0
    assert [node.op_type for node in after.graph.node] == [
        node.op_type for node in before.graph.node
    ]
    assert list(after.graph.initializer) == list(before.graph.initializer)
    weights = stripped.with_name("model.onnx.data")
    assert weights.read_bytes() == (tiny_export / "model.onnx.data").read_bytes()


def test_tensorrts_parser_follows_the_link_to_the_weights(
    tiny_export: Path, tmp_path: Path
) -> None:
    """The real function bodies put back: only the weights' link is in question."""
    trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    stripped = write_stripped_graph(tiny_export / "model.onnx", tmp_path / "stripped")
    stripped.write_bytes((tiny_export / "model.onnx").read_bytes())
    assert parse_network(trt, stripped).network.num_layers > 0


def test_the_original_graph_is_not_touched(tiny_export: Path, tmp_path: Path) -> None:
    before = (tiny_export / "model.onnx").read_bytes()
    write_stripped_graph(tiny_export / "model.onnx", tmp_path / "stripped")
    assert (tiny_export / "model.onnx").read_bytes() == before


@pytest.mark.parametrize(("version", "profile"), [("10.14.1", "opset24"), ("10.0.1", "compat")])
def test_a_tensorrt_too_old_for_the_export_is_refused(version: str, profile: str) -> None:
    with pytest.raises(InputError, match=profile):
        require_version(parse_version(version), profile)


@pytest.mark.parametrize(("version", "profile"), [("10.15.0", "opset24"), ("10.3.0", "compat")])
def test_the_oldest_tensorrt_of_each_export_is_taken(version: str, profile: str) -> None:
    require_version(parse_version(version), profile)


def test_a_version_suffix_is_left_out() -> None:
    assert parse_version("11.4.0.post1") == (11, 4, 0)
