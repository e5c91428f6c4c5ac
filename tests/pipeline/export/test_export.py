"""The exported folder computes what the checkpoint does: all families, both profiles."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from pipeline.checkpoint.folder import load_checkpoint
from pipeline.compress.request import CompressRequest
from pipeline.compress.run import compress_to_folder
from pipeline.errors import InputError, ResourceError, UsageError
from pipeline.export.export import export_folder
from pipeline.export.request import ExportRequest
from pipeline.runtime.sessions.onnx_session import OnnxSession
from tests.support.families import FAMILIES, save_family
from tests.support.model_families import in_pieces

MAX_LENGTH = 48
# An export takes seconds. Of the oldest opset the fast run sees one plain family and the one that
# differs most from it; the slow run sees all.
CASES = [
    pytest.param(
        family,
        profile,
        marks=[pytest.mark.slow]
        if (profile, family) not in (("compat", "llama"), ("opset24", "gemma3_text"))
        else [],
    )
    for family in FAMILIES
    for profile in ("opset24", "compat")
]
IDS = np.random.default_rng(0).integers(3, 250, size=(2, 17))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A compressed checkpoint of every family."""
    root = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        source = save_family(root / f"{family}-source", family)
        request = CompressRequest(
            str(source), 0.7, method="skipcat", windows=4, window_length=24, dtype="float32"
        )
        compress_to_folder(request, root / family)
    return {family: root / family for family in FAMILIES}


@pytest.fixture(scope="module")
def exported(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One export that several tests look at: qwen2, for it has biases."""
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    export_folder(checkpoints["qwen2"], folder, ExportRequest(max_length=MAX_LENGTH))
    return folder


def expected_logits(checkpoint: Path, ids: np.ndarray = IDS) -> np.ndarray:
    with torch.no_grad():
        model = load_checkpoint(checkpoint, dtype=torch.float32)
        return model(torch.from_numpy(ids)).logits.numpy()


def test_a_searched_plan_that_shares_some_and_keeps_some_dense_equals_torch(
    tmp_path: Path,
) -> None:
    source = save_family(tmp_path / "source", "qwen2")
    request = CompressRequest(str(source), 0.9, windows=8, window_length=24, dtype="float32")
    report = compress_to_folder(request, tmp_path / "checkpoint")
    assert {group["form"] for group in report["groups"]} == {"dense", "skip"}
    export_folder(tmp_path / "checkpoint", tmp_path / "onnx", ExportRequest(max_length=MAX_LENGTH))
    actual = in_pieces(OnnxSession(tmp_path / "onnx"), IDS, [5, 6, 7])
    expected = expected_logits(tmp_path / "checkpoint")
    np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(("family", "profile"), CASES)
def test_prefill_and_decode_equal_torch_in_one_graph(
    family: str, profile: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    request = ExportRequest(profile, "float32", MAX_LENGTH)
    record = export_folder(checkpoints[family], tmp_path / "onnx", request)
    session = OnnxSession(tmp_path / "onnx")
    expected = expected_logits(checkpoints[family])
    for cuts in ([], [9], [5, 6, 7, 8], list(range(1, 17))):
        actual = in_pieces(session, IDS, cuts)
        np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=2e-4)
    assert record["block_skip_nodes"] == 8
    assert record["permutations"]["folded"] == 2
    if profile == "opset24":
        assert record["fused"]["RotaryEmbedding"] == 4
        assert record["fused"]["RMSNormalization"] >= 5


def test_standard_names_and_axes(exported: Path) -> None:
    graph = onnx.load(exported / "model.onnx", load_external_data=False).graph
    inputs = {
        i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim]
        for i in graph.input
    }
    assert inputs["input_ids"] == ["batch_size", "sequence_length"]
    assert inputs["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert inputs["position_ids"] == ["batch_size", "sequence_length"]
    assert inputs["past_key_values.1.value"] == ["batch_size", 2, MAX_LENGTH, 8]
    assert [o.name for o in graph.output][:3] == ["logits", "present.0.key", "present.0.value"]


def test_the_graph_is_valid_onnx_with_inferable_shapes(exported: Path) -> None:
    onnx.checker.check_model(exported / "model.onnx", full_check=True)
    model = onnx.load(exported / "model.onnx")
    onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def test_weights_are_stored_once(exported: Path) -> None:
    record = json.loads((exported / "export.json").read_text())
    # The tiny graph itself weighs more than its weights, so only those count here.
    assert record["data_bytes"] <= 1.05 * record["weight_bytes"]


def test_both_kinds_of_node_carry_a_body(exported: Path) -> None:
    model = onnx.load(exported / "model.onnx", load_external_data=False)
    assert {f.name for f in model.functions} == {"BlockSkipLinear", "BlockSkipLinearIndexed"}


def test_a_longer_mask_padded_with_zeros_means_the_same(exported: Path) -> None:
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    feed = {"input_ids": IDS, "position_ids": np.arange(17)[None].repeat(2, 0)}
    feed |= {
        entry.name: np.zeros([2, *entry.shape[1:]], dtype=np.float32)
        for entry in session.get_inputs()
        if entry.name.startswith("past")
    }
    short = session.run(["logits"], feed | {"attention_mask": np.ones((2, 17), np.int64)})[0]
    mask = np.zeros((2, MAX_LENGTH), np.int64)
    mask[:, :17] = 1
    padded = session.run(["logits"], feed | {"attention_mask": mask})[0]
    np.testing.assert_allclose(padded, short, rtol=1e-5, atol=1e-5)


PADS = 4


def padded_logits(folder: Path, side: str, dtype: type) -> np.ndarray:
    """Logits of a batch whose first row is padded."""
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    ids, mask = IDS.copy(), np.ones((2, 17), np.int64)
    hidden = slice(0, PADS) if side == "left" else slice(17 - PADS, 17)
    ids[0, hidden], mask[0, hidden] = 0, 0
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    feed |= {
        entry.name: np.zeros([2, *entry.shape[1:]], dtype=dtype)
        for entry in session.get_inputs()
        if entry.name.startswith("past")
    }
    return session.run(["logits"], feed)[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_a_rows_logits(
    side: str, exported: Path, checkpoints: dict[str, Path]
) -> None:
    real = slice(PADS, 17) if side == "left" else slice(0, 17 - PADS)
    logits = padded_logits(exported, side, np.float32)
    alone = expected_logits(checkpoints["qwen2"], IDS[:1, real])
    np.testing.assert_allclose(logits[:1, real], alone, rtol=2e-4, atol=2e-4)
    assert np.isfinite(logits).all()


def test_float16_export_is_near_the_float32_model(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    request = ExportRequest("opset24", "float16", MAX_LENGTH)
    record = export_folder(checkpoints["llama"], tmp_path / "onnx", request)
    assert record["fused"] == {"RMSNormalization": 5, "RotaryEmbedding": 4}
    actual = in_pieces(OnnxSession(tmp_path / "onnx"), IDS, [9])
    expected = expected_logits(checkpoints["llama"])
    assert np.isfinite(padded_logits(tmp_path / "onnx", "left", np.float16)).all()
    cosine = (actual * expected).sum() / np.linalg.norm(actual) / np.linalg.norm(expected)
    assert cosine > 0.9999


def test_genai_generates_torchs_greedy_tokens_from_the_folder(
    exported: Path, checkpoints: dict[str, Path]
) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model = genai.Model(str(exported))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=32, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(IDS[0])
    while not generator.is_done() and len(generator.get_sequence(0)) < 32:
        generator.generate_next_token()
    tokens = generator.get_sequence(0)
    torch_model = load_checkpoint(checkpoints["qwen2"], dtype=torch.float32)
    with torch.no_grad():
        expected = torch_model.generate(
            torch.from_numpy(IDS[:1]), do_sample=False, max_length=32, pad_token_id=257
        )[0]
    assert list(tokens) == expected.tolist()[: len(tokens)]
    assert len(tokens) > 17


@pytest.mark.parametrize("profile", ["opset24", pytest.param("compat", marks=pytest.mark.slow)])
def test_factors_without_skip_export_with_their_latent_computed_once(
    profile: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    source = checkpoints["qwen2"].with_name("qwen2-source")
    request = CompressRequest(
        str(source), 0.7, method="skipcat", skip=False, windows=4, window_length=24
    )
    compress_to_folder(request, tmp_path / "small")
    record = export_folder(
        tmp_path / "small", tmp_path / "onnx", ExportRequest(profile, max_length=MAX_LENGTH)
    )
    assert record["block_skip_nodes"] == 0
    # A layer has 4 latents and 7 outputs; then there is the head, and compat's attention.
    attention = 0 if profile == "opset24" else 2 * 2
    assert record["nodes"]["MatMul"] == 2 * (4 + 7) + 1 + attention
    actual = in_pieces(OnnxSession(tmp_path / "onnx"), IDS, [9])
    np.testing.assert_allclose(actual, expected_logits(tmp_path / "small"), rtol=2e-4, atol=2e-4)


def test_a_plain_checkpoint_exports_too_and_a_cache_beyond_its_positions_is_bounded_aloud(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoints["llama"].with_name("llama-source")
    record = export_folder(source, tmp_path / "onnx", ExportRequest(max_length=10**9))
    assert record["block_skip_nodes"] == 0
    assert record["max_length"] == 256  # the model's positions
    assert "256 positions" in record["max_length_bound"]
    assert record["max_length_bound"] in capsys.readouterr().err
    actual = in_pieces(OnnxSession(tmp_path / "onnx"), IDS, [9])
    np.testing.assert_allclose(actual, expected_logits(source), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    "request_",
    [
        ExportRequest(profile="opset99"),
        ExportRequest(dtype="int3"),
        ExportRequest(max_length=1),
    ],
)
def test_impossible_requests_are_refused_before_any_work(
    request_: ExportRequest, tmp_path: Path
) -> None:
    with pytest.raises(UsageError):
        export_folder(tmp_path / "nothing", tmp_path / "onnx", request_)


def test_a_failed_export_leaves_nothing(
    exported: Path,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The graph is proven since `exported`, so that it is the output which is half written."""

    def broken(graph: object, profile: object, folder: Path) -> None:
        (folder / "model.onnx").write_bytes(b"half of")
        assert folder.parent == tmp_path
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.export.export._save_graph", broken)
    with pytest.raises(ResourceError, match="No space"):
        export_folder(checkpoints["qwen2"], tmp_path / "onnx", ExportRequest(max_length=MAX_LENGTH))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Not a checkpoint"):
        export_folder(tmp_path / "nothing", tmp_path / "onnx", ExportRequest())
