"""Exports whose matrices are codes of few bits, through TensorRT for RTX, which needs no GPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.artefact import sha256_of_file
from pipeline.checkpoint.folder import load_checkpoint
from pipeline.cli.main import main
from pipeline.compress.plan.plan import uniform_plan
from pipeline.compress.request import CompressRequest
from pipeline.compress.run import compress_to_folder
from pipeline.engine.build import build_engine
from pipeline.engine.paths import _quantized_path, paths_taken
from pipeline.engine.plan import EngineRequest
from pipeline.engine.standard import _require_ops, graph_to_parse
from pipeline.engine.target import Target
from pipeline.engine.worker_protocol import WorkerRequest
from pipeline.errors import InputError
from pipeline.export.contract import (
    BLOCK_SKIP_OPS,
    DEQUANTIZED_SKIP_OPS,
    LINEAR_QUANTIZED,
    QUANTIZED_OPS,
)
from pipeline.export.export import export_folder
from pipeline.export.onnx_folder import load_graph, read_onnx_folder
from pipeline.export.request import ExportRequest
from pipeline.model.structure import decoder_structure
from tests.support.families import save_family
from tests.support.quantised_layers import save_low_bit_llama
from tests.support.unproven import unproven

SM86 = Target("rtx", (8, 6), "a test")
# TensorRT has no fused attention for narrower heads.
SHAPE = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "head_dim": 64}
# A' and B' by the group's first member; one group stays as numbers, and one factor of another.
STYLES: dict[str, tuple[str | None, str | None]] = {
    "layers.0.self_attn.q_proj": ("int4-b64-sym", "int4-b64-sym"),
    "layers.0.self_attn.o_proj": ("int8-row-sym", None),
    "layers.0.mlp.gate_proj": (None, None),
    "layers.1.self_attn.q_proj": ("int8-row-sym", "int8-row-sym"),
    "layers.1.self_attn.o_proj": ("int4-b64-sym", "int8-row-sym"),
    "layers.1.mlp.gate_proj": ("int8-row-sym", "int4-b64-sym"),
}


def plan_of(source: Path, path: Path) -> str:
    """Ranks of 64, and dense down projections; formats as above."""
    uniform_plan(decoder_structure(load_checkpoint(source)), 0.7, multiple=64).save(path)
    plan = json.loads(path.read_text())
    for groups in plan["layers"].values():
        for group in groups:
            styles = STYLES.get(group["members"][0].removeprefix("model."))
            if styles is None:
                group |= {"form": "dense", "rank": 128, "down_style": None}
                group |= {"up_style": "int4-b64-sym", "reason": None}
            else:
                group |= {"form": "skip", "rank": 64, "reason": None}
                group |= {"down_style": styles[0], "up_style": styles[1]}
    plan["tables"] = dict.fromkeys(("model.embed_tokens", "lm_head"), "int8-row-sym")
    path.write_text(json.dumps(plan))
    return str(path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float16 export of opset24 with int4 and int8 codes; not to be written to."""
    root = tmp_path_factory.mktemp("few-bits")
    source = save_family(root / "source", "smollm", **SHAPE)
    (root / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 60)
    settings: dict[str, Any] = {"windows": 8, "window_length": 64, "method": "skipcat"}
    settings |= {"calibration": str(root / "text.txt"), "runtime": "tensorrt"}
    plan = plan_of(source, root / "plan.json")
    compress_to_folder(CompressRequest(str(source), plan=plan, **settings), root / "small")
    with unproven():
        export_folder(root / "small", root / "onnx", ExportRequest("opset24", "float16", 32))
    return root / "onnx"


def test_the_engine_reads_every_matrix_as_codes(exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    manifest = build_engine(exported, tmp_path / "engine", EngineRequest(SM86))
    record = json.loads((exported / "export.json").read_text())
    matrices = sum(record["quantized"].values()) + 1  # the table is looked up as well
    assert record["nodes"]["DequantizeLinear"] == 1
    assert "go through DequantizeLinear" in " ".join(manifest["notes"])
    assert [path.name for path in (tmp_path / "engine").iterdir() if path.is_dir()] == []
    assert manifest["few_bits"] == {
        "matrices": matrices,
        "block_skip_nodes": 5,
        "path": "function body",
    }
    assert manifest["block_skip"] == {"path": "function body", "nodes": 1, "plugin": None}
    assert manifest["layer_types"]["DEQUANTIZE"] == matrices


def test_the_command_names_the_matrices_that_are_codes(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    arguments = ["engine", str(exported), "-o", str(tmp_path / "engine"), "--target", "sm86"]
    assert main(arguments) == 0
    assert "matrices, read as codes" in capsys.readouterr().out


def test_the_folder_counts_nodes_of_codes_apart(exported: Path) -> None:
    folder = read_onnx_folder(exported)
    quantized = json.loads((exported / "export.json").read_text())["quantized"]
    assert (folder.block_skip_nodes, folder.quantized_nodes, folder.dequantized) == (1, 0, 1)
    assert folder.coded_nodes == 5 + 3  # two down projections, and the head
    assert folder.coded_matrices == sum(quantized.values()) == 5 + 4 + 3


def request_of(exported: Path, **fields: Any) -> WorkerRequest:
    """What a worker is asked for an export, but for profiles."""
    folder = read_onnx_folder(exported)
    shared: dict[str, Any] = {"shared_weights": False, "workspace_bytes": None, "plugin": None}
    shared |= {"block_skip_nodes": folder.block_skip_nodes, "onnx_profile": "opset24"}
    shared |= {"dequantized": folder.dequantized, "quantized_nodes": folder.quantized_nodes}
    shared |= {"coded_nodes": folder.coded_nodes, "coded_matrices": folder.coded_matrices}
    return WorkerRequest("tensorrt", (8, 7), folder.onnx_path, (), **(shared | fields))


def graph_given(request: WorkerRequest, staging: Path, offered: set[str]) -> Any:
    """What TensorRT 10.3 would be given, and what the request then says of it."""
    holds, path, notes = graph_to_parse(request, staging, "10.3.0", offered)
    return load_graph(path), holds, notes


EVERY_OP = {*BLOCK_SKIP_OPS, *QUANTIZED_OPS}


def test_with_the_plugin_every_node_of_codes_is_left_to_it(exported: Path, tmp_path: Path) -> None:
    request = request_of(exported, plugin=Path("library.so"))
    graph, holds, _ = graph_given(request, tmp_path, EVERY_OP)
    assert graph.functions == []
    assert holds == request
    nodes = request.block_skip_nodes + request.coded_nodes
    taken = paths_taken(holds, {"PLUGIN_V3": nodes, "DEQUANTIZE": 1})
    assert taken["block_skip"] == {"path": "plugin", "nodes": nodes}
    matrices = holds.coded_matrices + 1
    assert taken["few_bits"] == {"matrices": matrices, "block_skip_nodes": 0, "path": "plugin"}
    with pytest.raises(InputError, match="Only part"):
        paths_taken(holds, {"PLUGIN_V3": request.block_skip_nodes, "DEQUANTIZE": 1})


def test_a_library_that_lacks_an_op_of_codes_is_refused(exported: Path, tmp_path: Path) -> None:
    request = request_of(exported, plugin=tmp_path / "old.so")
    lacking = EVERY_OP - {LINEAR_QUANTIZED + "8"}
    with pytest.raises(InputError, match="does not know") as caught:
        _require_ops(request, lacking)
    assert caught.value.details["observed"] == "no LinearQuantized8"


@pytest.mark.parametrize("embed", [False, True])
def test_without_the_library_codes_go_through_dequantize_linear(
    embed: bool, exported: Path, tmp_path: Path
) -> None:
    request = request_of(exported, embed=embed)
    graph, holds, notes = graph_given(request, tmp_path, set())
    ops = [node.op_type for node in graph.graph.node]
    assert not {*ops} & {*QUANTIZED_OPS}
    assert ops.count("DequantizeLinear") == holds.dequantized == request.coded_matrices + 1
    few = {op for op in ops if op in DEQUANTIZED_SKIP_OPS}
    assert sum(op in few for op in ops) == holds.quantized_nodes == 5
    assert {function.name for function in graph.functions} == few | (
        set() if embed else {*ops} & {*BLOCK_SKIP_OPS}
    )
    assert holds.coded_nodes == 0
    assert "DequantizeLinear" in notes[0]
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert folders == (["split"] if embed else ["without-plugin"])


def test_a_folder_that_was_exported_with_dequantize_linear_is_taken_as_before(
    exported: Path, tmp_path: Path
) -> None:
    """What other versions wrote: FewBits ops, whose bodies stay beside the plugin."""
    old, _, _ = graph_given(request_of(exported), tmp_path / "staging", set())
    shutil.copytree(exported, tmp_path / "onnx")
    (tmp_path / "onnx" / "model.onnx").write_bytes(old.SerializeToString())
    record = json.loads((tmp_path / "onnx" / "export.json").read_text())
    record["onnx_sha256"] = sha256_of_file(tmp_path / "onnx" / "model.onnx")
    (tmp_path / "onnx" / "export.json").write_text(json.dumps(record))
    folder = read_onnx_folder(tmp_path / "onnx")
    assert (folder.block_skip_nodes, folder.quantized_nodes, folder.coded_nodes) == (1, 5, 0)
    request = request_of(tmp_path / "onnx", plugin=Path("library.so"))
    graph, holds, _ = graph_given(request, tmp_path / "second", EVERY_OP)
    assert {function.name for function in graph.functions} <= {*DEQUANTIZED_SKIP_OPS}
    taken = paths_taken(holds, {"PLUGIN_V3": 1, "DEQUANTIZE": folder.dequantized})
    assert taken["block_skip"] == {"path": "plugin", "nodes": 1}
    assert taken["few_bits"]["path"] == "function body"


@pytest.mark.slow
def test_an_engine_of_the_older_opset_holds_codes_too(tmp_path: Path) -> None:
    """TensorRT's parser takes blocks in opset 18, which JetPack 6.2 is given."""
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    checkpoint = save_low_bit_llama(tmp_path / "checkpoint")
    export_folder(checkpoint, tmp_path / "onnx", ExportRequest("compat", "float16", 48))
    manifest = build_engine(tmp_path / "onnx", tmp_path / "engine", EngineRequest(SM86))
    # Two layers of two factored groups and two dense matrices, the head, and the look-up.
    expected = {"matrices": 2 * 6 + 2, "block_skip_nodes": 4, "path": "function body"}
    assert manifest["few_bits"] == expected
    assert manifest["layer_types"]["DEQUANTIZE"] == 2 * 6 + 2


def test_codes_that_became_numbers_while_parsing_are_refused() -> None:
    with pytest.raises(InputError, match="as numbers") as caught:
        _quantized_path({"DEQUANTIZE": 3, "MATRIX_MULTIPLY": 4}, 4, 1)
    assert caught.value.details["observed"].startswith("3 layers")


def test_a_graph_of_numbers_has_no_path_for_codes() -> None:
    expected = {"matrices": 0, "block_skip_nodes": 0, "path": "none"}
    assert _quantized_path({"MATRIX_MULTIPLY": 4}, 0, 0) == expected


def test_dense_codes_alone_need_no_body() -> None:
    assert _quantized_path({"DEQUANTIZE": 4}, 4, 0)["path"] == "none"
    assert _quantized_path({"DEQUANTIZE": 1}, 1, 0, 3) == {
        "matrices": 4,
        "block_skip_nodes": 0,
        "path": "plugin",
    }


def test_weights_that_do_not_match_the_graph_are_noticed(exported: Path, tmp_path: Path) -> None:
    """The codes are external data like any other weights."""
    shutil.copytree(exported, tmp_path / "onnx")
    (tmp_path / "onnx" / "model.onnx.data").unlink()
    with pytest.raises(InputError, match="missing"):
        read_onnx_folder(tmp_path / "onnx")
