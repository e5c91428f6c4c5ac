"""A graph or weights that are not what the record beside them says are refused at opening."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from pipeline.artefact import sha256_of_file
from pipeline.errors import InputError
from pipeline.runtime.sessions.image_sessions import OnnxImages
from pipeline.runtime.sessions.open_session import open_session
from tests.support.tiny_decoder import shared_export

WRITTEN = Path(__file__).parents[3] / "fixtures" / "written_before"
PROFILES = ("opset24", "compat", "cpu")


def changed_record(folder: Path, **changes: Any) -> Path:
    path = folder / "export.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def changed_graph(folder: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """The folder with another graph, and its hash in the record."""
    path = folder / "model.onnx"
    model = onnx.load(str(path), load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    return changed_record(folder, onnx_sha256=sha256_of_file(path))


@pytest.fixture(params=PROFILES)
def copy(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return shutil.copytree(shared_export(request.param), tmp_path / request.param)


@pytest.mark.timeout(60)  # nothing of the size that the record says is made, or gone through
@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 271},
        {"vocab_size": 10**9},
        {"num_layers": 10**9},
        {"num_layers": 1},
        {"max_length": -5},
        {"max_length": 0},
        {"max_length": 10**9},
        {"max_length": 10**15},
        {"max_length": 5.0},
        {"max_length": True},
        {"data_bytes": "many"},
        {"data_bytes": 1},
        {"data_sha256": "0" * 64},
        {"weights": "int5"},
        {"task": []},
    ],
)
def test_a_record_that_contradicts_graph_or_weights_is_refused_at_once(
    copy: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(InputError):
        open_session(changed_record(copy, **changes))


def test_a_length_beyond_the_table_of_angles_is_refused_at_opening(tmp_path: Path) -> None:
    copy = shutil.copytree(WRITTEN / "onnx-cpu", tmp_path / "cpu")  # 64 tokens of 128 positions
    with pytest.raises(InputError, match="cannot run"):
        open_session(changed_record(copy, max_length=100))


def rename_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "other"


def forget_width(model: onnx.ModelProto) -> None:
    """A graph whose declared outputs say nothing: only what it gives tells."""
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_param = "any"


def drop_axis(model: onnx.ModelProto) -> None:
    del model.graph.input[0].type.tensor_type.shape.dim[1]


def retype_mask(model: onnx.ModelProto) -> None:
    model.graph.input[1].type.tensor_type.elem_type = onnx.TensorProto.FLOAT


def retype_node(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type in ("Mul", "Add", "MatMul"))
    node.op_type = "Concat"


def break_node(model: onnx.ModelProto) -> None:
    """What loads, and fails when it runs: rows looked up that are not there."""
    table = next(n for n in model.graph.node if "Gather" in n.op_type and "input_ids" in n.input)
    table.input[list(table.input).index("input_ids")] = "beyond"
    large = onnx.helper.make_tensor("large", onnx.TensorProto.INT64, [1], [10**6])
    model.graph.initializer.append(large)
    node = onnx.helper.make_node("Add", ["input_ids", "large"], ["beyond"])
    model.graph.node.insert(list(model.graph.node).index(table), node)


GRAPHS = (rename_output, drop_axis, retype_mask, retype_node)


@pytest.mark.parametrize("change", GRAPHS)
def test_a_graph_of_another_kind_is_refused_at_opening(
    copy: Path, change: Callable[[onnx.ModelProto], None]
) -> None:
    with pytest.raises(InputError):
        open_session(changed_graph(copy, change))


def test_a_graph_that_loads_and_cannot_run_is_refused_at_opening(tmp_path: Path) -> None:
    copy = shutil.copytree(shared_export("compat"), tmp_path / "copy")
    with pytest.raises(InputError, match="cannot run"):
        open_session(changed_graph(copy, break_node))


def test_logits_that_the_graph_does_not_declare_are_held_to_the_record(copy: Path) -> None:
    changed_graph(copy, forget_width)
    open_session(copy)
    with pytest.raises(InputError, match="logits"):
        open_session(changed_record(copy, vocab_size=271))


@pytest.mark.parametrize(
    "changes", [{"classes": 11}, {"pixel_values": [3, 16]}, {"pixel_values": [3, 16, "16"]}]
)
def test_a_classifier_is_held_to_its_record(tmp_path: Path, changes: dict[str, Any]) -> None:
    copy = shutil.copytree(WRITTEN / "onnx-classifier", tmp_path / "copy")
    OnnxImages(copy, "before")
    with pytest.raises(InputError):
        OnnxImages(changed_record(copy, **changes), "after")


def test_weights_with_every_bit_turned_are_refused(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SKIPCAT_CACHE", str(tmp_path / "cache"))
    data = copy / "model.onnx.data"
    data.write_bytes(bytes(255 - byte for byte in data.read_bytes()))
    with pytest.raises(InputError, match="another export"):
        open_session(copy)


def test_a_record_of_before_without_size_and_hash_is_taken(copy: Path) -> None:
    path = copy / "export.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in record.items() if not k.startswith("data_")}))
    open_session(copy)
