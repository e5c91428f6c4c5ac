"""The graph for embedded kernels computes what the exported one does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from pipeline.engine import plan
from pipeline.engine.network import _parse_network
from pipeline.engine.plan import _choose_plugin, _require_plugin_file
from pipeline.engine.standard import (
    _our_creators,
    _parse_version,
    _PluginCreator,
    _require_version,
    _write_split_graph,
    _write_stripped_graph,
    load_plugin,
    prefers_functions,
)
from pipeline.errors import InputError
from pipeline.export.block_skip import PLUGIN_ATTRIBUTES
from pipeline.export.contract import BLOCK_SKIP, DOMAIN
from pipeline.export.contract import LATENT_ATTENTION as LATENT
from pipeline.export.latent_attention import function_bodies
from pipeline.export.onnx_folder import load_graph

# What TensorRT's embedded kernels compute, for ONNX Runtime.
MIX = """
<domain: "skipcat", opset_import: ["" : 18]>
BlockSkipMix (x, a) => (z)
{
    rank = Shape <start = 1, end = 2> (a)
    rest = Shape <start = 0, end = 1> (a)
    widths = Concat <axis = 0> (rank, rest)
    x1, x2 = Split <axis = -1> (x, widths)
    mixed = MatMul (x2, a)
    z = Add (x1, mixed)
}
"""
MIX_INDEXED = MIX.replace("BlockSkipMix (x, a)", "BlockSkipMixIndexed (x, a, index)").replace(
    "x1, x2 = Split <axis = -1> (x,",
    "ordered = Gather <axis = -1> (x, index)\n    x1, x2 = Split <axis = -1> (ordered,",
)
PRODUCT = """
<domain: "skipcat", opset_import: ["" : 18]>
BlockSkipProduct (z, b) => (y) { y = MatMul (z, b) }
"""
OURS = _PluginCreator("BlockSkipLinear", "1", "skipcat")


def answers(path: Path) -> list[np.ndarray]:
    """Outputs of the tiny compat model on fixed inputs."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    random = np.random.default_rng(1)
    past = (1, 2, 3, 64)
    inputs: dict[str, Any] = {
        "input_ids": np.array([[4, 5]]),
        "attention_mask": np.ones((1, 5), dtype=np.int64),
        "position_ids": np.array([[3, 4]]),
        "past_key_values.0.key": random.standard_normal(past).astype(np.float32),
        "past_key_values.0.value": random.standard_normal(past).astype(np.float32),
    }
    return [np.asarray(output) for output in session.run(None, inputs)]


def test_the_split_graph_computes_the_same(
    tmp_path: Path, export_writer: Callable[..., Path]
) -> None:
    source = export_writer(tmp_path / "onnx", profile="compat", dtype="float32") / "model.onnx"
    split = _write_split_graph(source, tmp_path / "split")
    model = load_graph(split)
    model.functions.extend(map(onnx.parser.parse_function, (MIX, PRODUCT)))
    # ONNX Runtime follows no link to weights.
    runnable = source.with_name("split.onnx")
    runnable.write_bytes(model.SerializeToString())
    for ours, original in zip(answers(runnable), answers(source), strict=True):
        np.testing.assert_array_equal(ours, original)


def test_an_indexed_node_passes_its_index_to_the_first_product(
    tmp_path: Path, export_writer: Callable[..., Path]
) -> None:
    path = export_writer(tmp_path / "onnx") / "model.onnx"
    model = load_graph(path)
    for node in model.graph.node:
        if node.op_type == "BlockSkipLinear":
            node.op_type = "BlockSkipLinearIndexed"
            node.input.append("order")
    path.write_bytes(model.SerializeToString())
    nodes = load_graph(_write_split_graph(path, tmp_path / "split")).graph.node
    mixes = [node for node in nodes if node.op_type == "BlockSkipMixIndexed"]
    assert [list(node.input)[2:] for node in mixes] == [["order"], ["order"]]


def test_every_node_becomes_two_that_must_be_embedded(tiny_export: Path, tmp_path: Path) -> None:
    before = (tiny_export / "model.onnx").read_bytes()
    split = _write_split_graph(tiny_export / "model.onnx", tmp_path / "split")
    model = load_graph(split)
    ours = [node for node in model.graph.node if node.domain == "skipcat"]
    assert [node.op_type for node in ours] == ["BlockSkipMix", "BlockSkipProduct"] * 2
    for node in ours:
        values = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        assert values == {"plugin_namespace": b"skipcat", "plugin_version": b"1", "aot": 1}
    assert len({node.name for node in ours}) == len(ours)
    assert len(model.functions) == 0
    assert split.with_name("model.onnx.data").is_file()
    assert (tiny_export / "model.onnx").read_bytes() == before


@pytest.mark.parametrize(
    ("version", "expected"),
    [("10.3.0", True), ("10.6.0.26", True), ("10.7.0", False), ("11.4.0.106", False)],
)
def test_versions_before_10_7_prefer_functions(version: str, expected: bool) -> None:
    assert prefers_functions(version) is expected


def test_stripping_leaves_nodes_and_weights_and_takes_the_bodies(
    tiny_export: Path, tmp_path: Path
) -> None:
    source = tiny_export / "model.onnx"
    stripped = _write_stripped_graph(source, tmp_path / "stripped")
    before, after = load_graph(source), load_graph(stripped)
    assert len(before.functions) == 1
    assert len(after.functions) == 0
    assert [node.op_type for node in after.graph.node] == [
        node.op_type for node in before.graph.node
    ]
    assert list(after.graph.initializer) == list(before.graph.initializer)
    weights = stripped.with_name("model.onnx.data")
    assert weights.read_bytes() == (tiny_export / "model.onnx.data").read_bytes()


@pytest.mark.parametrize(
    ("has_attributes", "offered", "left"),
    [
        (True, {BLOCK_SKIP, LATENT}, []),
        (True, {BLOCK_SKIP}, [LATENT]),
        (False, {BLOCK_SKIP, LATENT}, [LATENT]),
    ],
)
def test_stripping_takes_the_bodies_of_latents_that_a_plugin_is_there_for(
    has_attributes: bool, offered: set[str], left: list[str], tmp_path: Path
) -> None:
    inputs = ["query", "mask", "keys", "values"]
    attributes = PLUGIN_ATTRIBUTES if has_attributes else {}
    node = onnx.helper.make_node(LATENT, inputs, ["y"], domain=DOMAIN, **attributes)
    value = onnx.helper.make_tensor_value_info
    sizes = {name: value(name, onnx.TensorProto.FLOAT16, [1, 2, 3, 4]) for name in [*inputs, "y"]}
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "one", [sizes[n] for n in inputs], [sizes["y"]]),
        functions=[ir.serde.serialize_function(function_bodies(18, {LATENT})[LATENT])],
    )
    onnx.save(model, tmp_path / "model.onnx")
    stripped = _write_stripped_graph(tmp_path / "model.onnx", tmp_path / "stripped", offered)
    assert [function.name for function in load_graph(stripped).functions] == left


def test_tensorrts_parser_follows_the_link_to_the_weights(
    tiny_export: Path, tmp_path: Path
) -> None:
    """The real function bodies put back: only the weights' link is in question."""
    trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    stripped = _write_stripped_graph(tiny_export / "model.onnx", tmp_path / "stripped")
    stripped.write_bytes((tiny_export / "model.onnx").read_bytes())
    assert _parse_network(trt, stripped).network.num_layers > 0


def test_the_original_graph_is_not_touched(tiny_export: Path, tmp_path: Path) -> None:
    before = (tiny_export / "model.onnx").read_bytes()
    _write_stripped_graph(tiny_export / "model.onnx", tmp_path / "stripped")
    assert (tiny_export / "model.onnx").read_bytes() == before


@pytest.mark.parametrize(("version", "profile"), [("10.14.1", "opset24"), ("10.0.1", "compat")])
def test_a_tensorrt_too_old_for_the_export_is_refused(version: str, profile: str) -> None:
    with pytest.raises(InputError, match=profile):
        _require_version(_parse_version(version), profile)


@pytest.mark.parametrize(("version", "profile"), [("10.15.0", "opset24"), ("10.3.0", "compat")])
def test_the_oldest_tensorrt_of_each_export_is_taken(version: str, profile: str) -> None:
    _require_version(_parse_version(version), profile)


def test_a_version_suffix_is_left_out() -> None:
    assert _parse_version("11.4.0.post1") == (11, 4, 0)


def test_only_the_name_version_and_namespace_of_the_nodes_count() -> None:
    others = [
        _PluginCreator("BlockSkipLinear", "1", ""),
        _PluginCreator("BlockSkipLinear", "2", "skipcat"),
        _PluginCreator("NMS", "1", "skipcat"),
    ]
    assert _our_creators([*others, OURS]) == [OURS]


def test_a_missing_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing"):
        _require_plugin_file(tmp_path / "absent.so")


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    path = tmp_path / "empty.so"
    path.write_bytes(b"not a library")
    with pytest.raises(InputError, match="cannot load"):
        load_plugin(trt, path)


def test_the_plugin_that_was_built_is_taken_unless_another_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, named = tmp_path / "built.so", tmp_path / "named.so"
    monkeypatch.setattr(plan, "BUILT_PLUGIN", built)
    path, said = _choose_plugin(None)
    assert path is None
    assert "make plugin" in said
    assert "function body" in said
    built.write_bytes(b"")
    assert _choose_plugin(None)[0] == built
    named.write_bytes(b"")
    assert _choose_plugin(named)[0] == named
