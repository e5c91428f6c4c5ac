"""The graph of a static cache as TensorRT is given it without a plugin: its cache grows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from pipeline.engine.growing_cache import growing_inputs, let_cache_grow
from pipeline.engine.plan import EngineRequest, form_of_cache, plan_engine
from pipeline.engine.target import Target
from pipeline.errors import InputError
from pipeline.export.onnx_folder import load_graph, read_onnx_folder
from pipeline.gpu import ORIN
from pipeline.runtime.sessions.onnx_session import OnnxSession
from tests.support.tiny_decoder import shared_export, write_record
from tests.support.tiny_graph import write_export

STATIC = "compat-static"
TARGET = Target("tensorrt", ORIN, "a test")


@pytest.fixture
def grown(tmp_path: Path) -> Path:
    """`shared_export(STATIC)` with a cache that grows, as an export of the profile `compat`."""
    folder = shutil.copytree(shared_export(STATIC), tmp_path / "grown")
    model = load_graph(folder / "model.onnx")
    let_cache_grow(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    before = json.loads((folder / "export.json").read_text())
    kept = {name: before[name] for name in ("cache", "data_sha256", "block_skip_nodes")}
    write_record(folder, "compat", **kept)
    return folder


def test_it_has_the_logits_of_an_export_that_grows_bit_for_bit(grown: Path) -> None:
    found, expected = OnnxSession(grown), OnnxSession(shared_export("compat"))
    for ids in ([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]], [[6], [7]], [[7, 8], [9, 1]]):
        block = np.array(ids)
        np.testing.assert_array_equal(found.forward(block), expected.forward(block))
    for session in (found, expected):
        session.rewind(2)
    again = np.array([[9, 9], [3, 3]])
    np.testing.assert_array_equal(found.forward(again), expected.forward(again))


def test_nothing_of_the_static_form_is_left(grown: Path) -> None:
    model = load_graph(grown / "model.onnx")
    assert "CacheWrite" not in {node.op_type for node in model.graph.node}
    assert "CacheWrite" not in {function.name for function in model.functions}
    made = {name for node in model.graph.node for name in node.output}
    read = {name for node in model.graph.node for name in node.input}
    assert made - read <= {value.name for value in model.graph.output}
    shapes = read_onnx_folder(grown).inputs
    assert shapes == growing_inputs(read_onnx_folder(shared_export(STATIC)).inputs)
    assert shapes["past_key_values.0.key"][2] is None


def test_a_graph_that_asks_a_cache_for_more_than_its_length_is_refused() -> None:
    model = load_graph(shared_export(STATIC) / "model.onnx")
    model.graph.node.insert(0, helper.make_node("Shape", ["past_key_values.1.key"], ["sizes"]))
    with pytest.raises(InputError, match="cannot be made to grow") as caught:
        let_cache_grow(model)
    assert "--profile compat" in str(caught.value)


def test_the_cache_is_static_with_a_plugin_and_grows_without(tmp_path: Path) -> None:
    source = write_export(tmp_path / "onnx", profile=STATIC)
    (tmp_path / "plugin.so").write_text("")
    folder = read_onnx_folder(source)
    assert folder.plugin_nodes == folder.block_skip_nodes + folder.cache_nodes == 4
    for plugin, profile, least in ((tmp_path / "plugin.so", STATIC, 16), (None, "compat", 0)):
        request = EngineRequest(TARGET, plugin=plugin)
        work = plan_engine(source, request, elsewhere=True).work
        assert (work.onnx_profile, work.writes_in_place) == (profile, plugin is not None)
        assert work.profiles[0].shapes["past_key_values.0.key"].min[2] == least
        assert form_of_cache(folder, plugin)[0] == profile
    other = read_onnx_folder(write_export(tmp_path / "other", profile="opset24"))
    assert form_of_cache(other, None) == ("opset24", other.inputs)
