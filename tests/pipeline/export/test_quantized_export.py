"""Checkpoints in few bits, exported with the codes they hold, compute what torch does."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from pipeline.checkpoint.folder import load_checkpoint
from pipeline.cli.main import main
from pipeline.compress.plan.plan import uniform_plan
from pipeline.compress.request import CompressRequest
from pipeline.compress.run import compress_to_folder
from pipeline.errors import UsageError
from pipeline.export.contract import BLOCK_SKIP_OPS, LINEAR_QUANTIZED, QUANTIZED_OPS
from pipeline.export.export import export_folder
from pipeline.export.request import ExportRequest
from pipeline.model.structure import decoder_structure
from pipeline.quantize.formats import RUNTIMES, Format
from pipeline.runtime.sessions.onnx_cpu_session import CpuSession
from pipeline.runtime.sessions.onnx_session import OnnxSession
from tests.support.families import save_family
from tests.support.unproven import unproven

MAX_LENGTH = 48
IDS = np.random.default_rng(0).integers(3, 250, size=(1, 19))
SHAPE = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "head_dim": 64}
STYLES: dict[str, dict[str, list[str | None]]] = {
    # A', B' of q/k/v, o, gate/up and down; only down is not factored, in the first layer.
    "cpu": {
        "0": [None, "int8-b32-sym", "int4-b32-asym", None, "int4-b16-offset", "int2-b32-asym"],
        "1": ["int8-b16-sym", "int4-b64-offset", "int8-b128-sym", "int2-b32-offset", None, None],
    },
    "tensorrt": {
        "0": ["int4-b64-sym", "int8-row-sym", "int4-b64-sym", None, None, "int4-b64-sym"],
        "1": ["int8-row-sym", "int8-row-sym", "int4-b64-sym", "int4-b64-sym", None, None],
    },
}
OFFSET_TABLE, HALF_TABLE = "int4-b32-offset", "int4-b64-sym"
TABLES = {"cpu": "int4-b32-asym", "tensorrt": "int8-row-sym", "any": "int3-b32-asym"}


def mixed_plan(source: Path, path: Path, runtime: str, table: str | None = None) -> Path:
    """Every kind of matrix: dense and factored, as numbers, in few bits, and one factor of each."""
    layers = decoder_structure(load_checkpoint(source))
    uniform_plan(layers, 0.7, multiple=64).save(path)
    plan = json.loads(path.read_text())
    for number, groups in enumerate(plan["layers"].values()):
        styles = STYLES[runtime][str(number)]
        for group in groups:
            kind = group["members"][0].rsplit(".", 1)[1]
            place = {"q_proj": 0, "o_proj": 2, "gate_proj": 4}.get(kind)
            if place is None:
                group |= {"form": "dense", "rank": min(group["rows"], group["columns"])}
                group |= {"up_style": styles[5], "reason": "as the test wants"}
            else:
                group |= {"form": "skip", "rank": 64, "reason": None}
                group |= {"down_style": styles[place], "up_style": styles[place + 1]}
    plan["tables"] = dict.fromkeys(("model.embed_tokens", "lm_head"), table or TABLES[runtime])
    path.write_text(json.dumps(plan))
    return path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Compressed by a mixed plan, of a model that ties its table to its head or does not."""
    root = tmp_path_factory.mktemp("few-bits")
    (root / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 60)

    def make(runtime: str, *, tied: bool = True, table: str | None = None) -> Path:
        folder = root / f"{runtime}-{tied}-{table}"
        if not folder.exists():
            source = root / f"source-{tied}"
            if not source.exists():
                save_family(source, "smollm", **SHAPE, tie_word_embeddings=tied)
            path = folder.with_suffix(".json")
            plan = str(mixed_plan(source, path, runtime, table))
            settings: dict[str, Any] = {"windows": 8, "window_length": 64, "method": "skipcat"}
            settings |= {"calibration": str(root / "text.txt"), "dtype": "float32"}
            compress_to_folder(
                CompressRequest(str(source), plan=plan, runtime=runtime, **settings), folder
            )
        return folder

    return make


@pytest.fixture(scope="module")
def exported(
    checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """The folder of an export, made once; not to be written to."""
    root = tmp_path_factory.mktemp("exports")

    def make(runtime: str, *, tied: bool = True, table: str | None = None, **fields: Any) -> Path:
        folder = root / "-".join(map(str, (runtime, tied, table, *fields, *fields.values())))
        if not folder.exists():
            request = ExportRequest(max_length=MAX_LENGTH, **fields)
            with unproven():
                export_folder(checkpoints(runtime, tied=tied, table=table), folder, request)
        return folder

    return make


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "export.json").read_text())
    return record


def torch_logits(folder: Path) -> np.ndarray:
    with torch.no_grad():
        model = load_checkpoint(folder, dtype=torch.float32)
        return model(torch.from_numpy(IDS)).logits.numpy()


def in_pieces(session: CpuSession | OnnxSession) -> np.ndarray:
    """Logits of a prefill and of tokens one by one."""
    session.reset()
    pieces = np.split(IDS, [9, 10, 11], axis=1)
    return np.concatenate([session.forward(piece) for piece in pieces], axis=1).astype(np.float32)


def least_cosine(a: np.ndarray, b: np.ndarray) -> float:
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(((a * b).sum(-1) / norms).min())


def graph_of(folder: Path) -> onnx.GraphProto:
    return onnx.load(folder / "model.onnx").graph


@pytest.mark.parametrize(
    ("tied", "table"),
    [
        (True, None),
        (False, OFFSET_TABLE),
        pytest.param(False, None, marks=pytest.mark.slow),
        pytest.param(True, OFFSET_TABLE, marks=pytest.mark.slow),
    ],
)
def test_on_the_cpu_stored_codes_with_products_in_float_equal_torch(
    tied: bool,
    table: str | None,
    checkpoints: Callable[..., Path],
    exported: Callable[..., Path],
) -> None:
    folder = exported("cpu", tied=tied, table=table, profile="cpu", products="float")
    record = record_of(folder)
    assert record["weights"] == "stored"
    assert record["accuracy_level"] == 0
    expected = torch_logits(checkpoints("cpu", tied=tied, table=table))
    found = in_pieces(CpuSession(folder))
    assert least_cosine(found, expected) >= 0.999999
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


def test_products_of_integers_are_near(
    checkpoints: Callable[..., Path], exported: Callable[..., Path]
) -> None:
    folder = exported("cpu", profile="cpu")
    assert record_of(folder)["accuracy_level"] == 4
    found = in_pieces(CpuSession(folder))
    assert least_cosine(found, torch_logits(checkpoints("cpu"))) > 0.99


@pytest.mark.parametrize("tied", [True, False])
def test_an_asymmetric_table_is_looked_up_in_its_codes_with_zero_points(
    tied: bool, exported: Callable[..., Path]
) -> None:
    graph = graph_of(exported("cpu", tied=tied, profile="cpu", products="float"))
    node = next(node for node in graph.node if node.op_type == "GatherBlockQuantized")
    assert len(node.input) == 4  # codes, ids, scales, zero points
    head = next(node for node in graph.node if node.output[0] == "logits")
    assert (head.input[1] == node.input[0]) == tied
    assert not [w.name for w in graph.initializer if sorted(w.dims) == [128, 272]]


def test_groups_of_numbers_and_of_codes_stand_side_by_side(exported: Callable[..., Path]) -> None:
    folder = exported("cpu", profile="cpu")
    graph = graph_of(folder)
    bits = Counter(
        f"{kind} {a.i}"
        for kind in ("MatMulBlocks", "BlockSkipBlocks")
        for node in graph.node
        for a in node.attribute
        if node.op_type.startswith(kind) and a.name.startswith("bits")
    )
    assert record_of(folder)["quantized"] == dict(bits)
    assert {name.split()[1] for name in bits} == {"2", "4", "8"}
    assert {"MatMulBlocks 4", "BlockSkipBlocks 4"} <= set(bits)
    of_numbers = [node.name for node in graph.node if node.op_type in BLOCK_SKIP_OPS]
    assert of_numbers == ["model.layers.1.mlp.gate_proj+up_proj"]
    products = {node.name for node in graph.node if node.op_type == "MatMul"}
    assert {name for name in products if not re.search(r"\.(rest|sums\.\d+)$", name)} == {
        "model.layers.0.self_attn.q_proj+k_proj+v_proj.a",
        "model.layers.0.self_attn.o_proj.b",
        "model.layers.1.mlp.down_proj",
    }


@pytest.mark.parametrize(
    ("profile", "dtype", "tied", "table", "least"),
    # Float16 keeps 11 bits, and sums of 192 terms lose some: how many, the processor's instructions
    # decide (more than 0.9995 with AVX2, 0.9985 with AVX-512).
    [
        pytest.param("opset24", "float32", True, None, 0.999999, marks=pytest.mark.slow),
        ("opset24", "float32", False, None, 0.999999),
        ("opset24", "float16", True, None, 0.998),
        ("opset24", "float32", True, HALF_TABLE, 0.999999),
        ("compat", "float32", True, None, 0.999999),
        pytest.param("compat", "float32", False, HALF_TABLE, 0.999999, marks=pytest.mark.slow),
    ],
)
def test_for_tensorrt_stored_codes_equal_torch(
    profile: str,
    dtype: str,
    tied: bool,
    table: str | None,
    least: float,
    checkpoints: Callable[..., Path],
    exported: Callable[..., Path],
) -> None:
    folder = exported("tensorrt", tied=tied, table=table, profile=profile, dtype=dtype)
    record = record_of(folder)
    assert record["weights"] == "stored"
    found = in_pieces(OnnxSession(folder))
    expected = torch_logits(checkpoints("tensorrt", tied=tied, table=table))
    assert least_cosine(found, expected) >= least
    assert record["block_skip_nodes"] == 1  # of numbers, as its checkpoint has it
    ops = Counter(n.op_type for n in graph_of(folder).node if n.op_type in QUANTIZED_OPS)
    # In A' and B' of five groups: 8; in down projections that are not factored: 1, and the head.
    half_head = tied and table is not None
    assert record["quantized"].get("codes 4", 0) + record["quantized"]["codes 8"] == 10 - half_head
    assert sum(ops[op] for op in QUANTIZED_OPS if op.startswith("Linear")) == 2 - half_head


def test_every_linear_weight_of_a_model_in_few_bits_is_codes_and_held_once(
    exported: Callable[..., Path],
) -> None:
    folder = exported("tensorrt", tied=True, profile="opset24", dtype="float16")
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    kinds = {weight.name: (weight.data_type, list(weight.dims)) for weight in graph.initializer}
    half, whole = onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8
    for node in graph.node:
        if node.op_type not in QUANTIZED_OPS:
            continue
        attributes = {a.name: a.i for a in node.attribute if a.name.startswith("block")}
        for block in attributes.values():
            codes = next(i for i, name in enumerate(node.input) if kinds.get(name, [0])[0] == whole)
            (kind, stored), (of_scales, scales) = (kinds[n] for n in node.input[codes : codes + 2])
            assert (kind, of_scales) == (whole, half)
            assert scales[0] == -(-stored[0] // block)
            assert stored[1] in (scales[1], scales[1] // 2)
            del node.input[codes]
    # The table, and its scales, are looked up in the head's own codes.
    (lookup,) = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    head = next(node for node in graph.node if node.output[0] == "logits")
    assert head.op_type == LINEAR_QUANTIZED + "8"
    assert kinds[lookup.input[0]] == (whole, [128, 272])
    assert [w for w in graph.initializer if 272 in w.dims and 128 in w.dims] == [
        w for w in graph.initializer if w.name == lookup.input[0]
    ]
    matrices = {name: dims for name, (_, dims) in kinds.items() if len(dims) == 2}
    numbers = [n for n, dims in matrices.items() if kinds[n][0] == half and min(dims) >= 64]
    # Of the plan above, what it leaves as numbers.
    assert sorted(numbers) == [
        "model.layers.0.mlp.gate_proj+up_proj.a.T",
        "model.layers.0.self_attn.o_proj.b.T",
        "model.layers.1.mlp.down_proj.weight.T",
        "model.layers.1.mlp.gate_proj+up_proj.a",
        "model.layers.1.mlp.gate_proj+up_proj.b",
    ]


@pytest.mark.parametrize(("profile", "runtime"), [("cpu", "cpu"), ("opset24", "tensorrt")])
def test_folded_permutations_move_codes_with_their_rows(
    profile: str, runtime: str, checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    """The rows of gate and up go in the order that down wants, in few bits as they are."""
    source, plan_path = checkpoints(runtime).parent / "source-True", tmp_path / "plan.json"
    mixed_plan(source, plan_path, runtime)
    plan = json.loads(plan_path.read_text())
    formats = {"cpu": "int4-b32-asym", "tensorrt": "int4-b64-sym"}[runtime]
    for groups in plan["layers"].values():
        for group in groups:
            group |= {"form": "skip", "rank": 64, "reason": None}
            group |= {"down_style": formats, "up_style": formats}
    plan_path.write_text(json.dumps(plan))
    settings: dict[str, Any] = {"windows": 8, "window_length": 64, "method": "skipcat"}
    settings |= {"calibration": str(source.parent / "text.txt"), "dtype": "float32"}
    compress_to_folder(
        CompressRequest(str(source), plan=str(plan_path), **settings), tmp_path / "checkpoint"
    )
    request = ExportRequest(profile, "float32", MAX_LENGTH, products="float")
    with unproven():
        record = export_folder(tmp_path / "checkpoint", tmp_path / "onnx", request)
    assert record["permutations"]["folded"] == 2
    session = (CpuSession if profile == "cpu" else OnnxSession)(tmp_path / "onnx")
    expected = torch_logits(tmp_path / "checkpoint")
    assert least_cosine(in_pieces(session), expected) >= 0.999999


def test_formats_that_no_runtime_of_the_profile_takes_become_numbers_and_it_is_said(
    checkpoints: Callable[..., Path],
    exported: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = exported("cpu", profile="opset24")
    assert "weights are exported as float32, not quantised" in capsys.readouterr().err
    record = record_of(folder)
    assert record["weights"] == "float"
    assert record["quantized"] == {}
    assert record["accuracy_level"] is None
    assert (
        least_cosine(in_pieces(OnnxSession(folder)), torch_logits(checkpoints("cpu"))) >= 0.999999
    )


def test_numbers_can_be_asked_for(
    checkpoints: Callable[..., Path], exported: Callable[..., Path]
) -> None:
    folder = exported("cpu", profile="cpu", weights="float")
    assert (record_of(folder)["weights"], record_of(folder)["quantized"]) == ("float", {})
    assert least_cosine(in_pieces(CpuSession(folder)), torch_logits(checkpoints("cpu"))) >= 0.999999


WIDTHS = {
    runtime: {Format.parse(name): {128} for name in names}
    for runtime, names in {
        "cpu": ("int4-b32-asym", "int8-b64-sym"),
        "tensorrt": ("int4-b64-sym", "int8-row-sym"),
        "any": ("int3-b32-asym", "int6-b64-sym"),
    }.items()
}


@pytest.mark.parametrize(
    ("request_", "held", "named"),
    [
        (ExportRequest("cpu"), "any", "--profile cpu"),
        (ExportRequest("cpu"), "tensorrt", "--profile cpu"),
        (ExportRequest("cpu", weights="stored"), "any", "--profile cpu"),
        (ExportRequest("opset24", weights="stored"), "cpu", "--profile opset24"),
        (ExportRequest("compat", weights="stored"), "cpu", "--profile compat"),
        (ExportRequest("compat", weights="int8"), "tensorrt", "--weights"),
        (ExportRequest("cpu", weights="int8"), "cpu", "--weights"),
        (ExportRequest("cpu", weights="int4"), "any", "--weights"),
    ],
)
def test_codes_that_a_profile_cannot_hold_are_refused(
    request_: ExportRequest, held: str, named: str
) -> None:
    with pytest.raises(UsageError) as caught:
        request_.weights_of(WIDTHS[held])
    assert caught.value.details["where"] == named
    assert "change" in caught.value.details


def test_there_are_no_stored_codes_in_a_checkpoint_of_numbers() -> None:
    with pytest.raises(UsageError, match="no quantised matrix"):
        ExportRequest("cpu", weights="stored").weights_of({})
    assert ExportRequest("cpu").weights_of({}) == "int8"
    assert ExportRequest("opset24").weights_of({}) == "float"


def test_a_width_that_is_no_whole_blocks_becomes_numbers_for_tensorrt(
    capsys: pytest.CaptureFixture[str],
) -> None:
    style = Format.parse("int4-b64-sym")
    assert ExportRequest("opset24").weights_of({style: {128, 64}}) == "stored"
    assert ExportRequest("compat").weights_of({style: {128, 64}}) == "stored"
    assert ExportRequest("opset24").weights_of({style: {128, 73}}) == "float"
    assert RUNTIMES["tensorrt"].takes in capsys.readouterr().err
    with pytest.raises(UsageError, match="does not take"):
        ExportRequest("opset24", weights="stored").weights_of({style: {128, 73}})


@pytest.mark.parametrize(
    "arguments",
    [
        ["--profile", "cpu", "--weights", "stored", "--dtype", "float16"],
        ["--weights", "stored", "--profile", "cpu"],
        ["--weights", "int4"],
    ],
)
def test_a_refused_export_ends_with_status_2_and_leaves_nothing(
    arguments: list[str],
    checkpoints: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = checkpoints("tensorrt")
    assert main(["export", str(checkpoint), "-o", str(tmp_path / "onnx"), *arguments]) == 2
    assert "error:" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
