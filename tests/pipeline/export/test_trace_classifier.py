"""The exported graph classifies as the checkpoint does; engines build from it."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.checkpoint.folder import load_checkpoint
from pipeline.checkpoint.skeleton import Skeleton, StoredMatrix
from pipeline.compress.request import CompressRequest
from pipeline.compress.run import compress_to_folder
from pipeline.engine.build import build_engine
from pipeline.engine.plan import EngineRequest, plan_engine
from pipeline.engine.target import Target
from pipeline.errors import InputError, UsageError
from pipeline.export.export import export_folder
from pipeline.export.request import ExportRequest
from pipeline.runtime.sessions.open_session import open_session
from tests.support.classifiers import save_classifier
from tests.support.old_objects import old_objects_set_aside
from tests.support.unproven import unproven

SM86 = Target("rtx", (8, 6), "a test")
PROFILES = {"vit": "opset24", "swin": "compat"}


def classified(folder: Path, pixels: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    return session.run(["logits"], {"pixel_values": pixels})[0]


def expected(checkpoint: Path, pixels: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        model = load_checkpoint(checkpoint, dtype=torch.float32)
        return model(pixel_values=torch.from_numpy(pixels)).logits.numpy()


def pixels_of(count: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, 3, 16, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def exported(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A ViT and a Swin for TensorRT, in one profile each."""
    root = tmp_path_factory.mktemp("exported")
    for family, profile in PROFILES.items():
        export_folder(checkpoints[family], root / family, ExportRequest(profile, "float16"))
    return {family: root / family for family in PROFILES}


@pytest.mark.parametrize(
    ("family", "profile"),
    [("vit", "opset24"), ("deit", "compat"), ("swin", "opset24")],
)
def test_any_number_of_images_is_classified_as_by_torch(
    family: str, profile: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    record = export_folder(checkpoints[family], tmp_path / "onnx", ExportRequest(profile))
    for count in (1, 4):
        np.testing.assert_allclose(
            classified(tmp_path / "onnx", pixels_of(count)),
            expected(checkpoints[family], pixels_of(count)),
            rtol=1e-4,
            atol=1e-4,
        )
    assert record["block_skip_nodes"] == {"swin": 13}.get(family, 8)
    # The second matrix of every MLP reads what one linear layer and an elementwise function made.
    assert record["permutations"]["folded"] == {"swin": 3}.get(family, 2)
    assert (record["nodes"].get("Attention", 0) > 0) == (profile == "opset24")


def test_names_axes_bodies_and_files(exported: dict[str, Path]) -> None:
    folder = exported["swin"]
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    (given,), (returned,) = model.graph.input, model.graph.output
    axes = [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim]
    assert (given.name, axes) == ("pixel_values", ["batch_size", 3, 16, 16])
    assert returned.name == "logits"
    assert {f.name for f in model.functions} == {"BlockSkipLinear", "BlockSkipLinearIndexed"}
    record = json.loads((folder / "export.json").read_text())
    assert (record["task"], record["classes"]) == ("image-classification", 10)
    assert (folder / "preprocessor_config.json").is_file()


def test_few_bits_on_the_cpu_stay_close(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with unproven():
        record = export_folder(checkpoints["vit"], tmp_path / "onnx", ExportRequest("cpu"))
    assert record["weights"] == "int8"
    assert record["quantized"] == {"BlockSkipBlocks 8": 16, "MatMulBlocks 8": 1}
    own, wanted = (
        classified(tmp_path / "onnx", pixels_of(8)),
        expected(checkpoints["vit"], pixels_of(8)),
    )
    cosine = (own * wanted).sum() / np.linalg.norm(own) / np.linalg.norm(wanted)
    # Inputs and weights are rounded to 8 bits, in 32-wide layers.
    assert cosine > 0.995


def test_codes_of_the_checkpoint_are_exported_as_they_are(
    sources: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    request = CompressRequest(
        str(sources["vit"]), 0.8, weights="int8-b32-sym", effort="fast", calibration=str(images)
    )
    compress_to_folder(request, tmp_path / "checkpoint")
    with unproven():
        record = export_folder(tmp_path / "checkpoint", tmp_path / "onnx", ExportRequest("cpu"))
    assert record["weights"] == "stored"
    pixels = pixels_of(8)
    own, wanted = classified(tmp_path / "onnx", pixels), expected(tmp_path / "checkpoint", pixels)
    cosine = (own * wanted).sum() / np.linalg.norm(own) / np.linalg.norm(wanted)
    # The weights are the same; the node rounds its inputs to 8 bits.
    assert cosine > 0.999


def test_a_plain_classifier_exports_without_block_skip_nodes(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    record = export_folder(sources["deit-student"], tmp_path / "onnx", ExportRequest())
    assert record["block_skip_nodes"] == 0
    np.testing.assert_allclose(
        classified(tmp_path / "onnx", pixels_of(3)),
        expected(sources["deit-student"], pixels_of(3)),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("family", PROFILES)
def test_half_precision_stays_close(
    family: str, exported: dict[str, Path], checkpoints: dict[str, Path]
) -> None:
    own = classified(exported[family], pixels_of(6).astype(np.float16))
    # Logits of about 3, through a dozen layers of 11 bits.
    np.testing.assert_allclose(own, expected(checkpoints[family], pixels_of(6)), atol=2e-2)


@pytest.mark.parametrize("family", PROFILES)
def test_an_engine_is_built_without_a_gpu(
    family: str, exported: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    manifest = build_engine(exported[family], tmp_path / "engine", EngineRequest(SM86, max_batch=8))
    assert manifest["limits"] == {"max_batch": 8}
    assert manifest["profiles"][0]["shapes"]["pixel_values"]["max"] == [8, 3, 16, 16]
    assert manifest["block_skip"]["path"] == "function body"
    assert manifest["onnx"]["task"] == "image-classification"
    types = manifest["layer_types"]
    assert types.get("ATTENTION_INPUT", 0) == {"vit": 2, "swin": 0}[family]
    assert {p.name for p in (tmp_path / "engine").iterdir()} == {
        "engine.plan", "manifest.json", "build.log", "preprocessor_config.json",
    }  # fmt: skip
    with pytest.raises(InputError, match="decoder language models"):
        open_session(tmp_path / "engine")


def test_an_image_engine_has_no_decode_profile(exported: dict[str, Path]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    with pytest.raises(UsageError, match="no decode profile"):
        plan_engine(exported["vit"], EngineRequest(SM86, decode="separate"))


def test_verbs_that_take_tokens_refuse_an_image_classifier(
    exported: dict[str, Path], checkpoints: dict[str, Path]
) -> None:
    for folder in (exported["vit"], checkpoints["vit"]):
        with pytest.raises(InputError, match="decoder language models"):
            open_session(folder)


def test_masks_of_many_windows_are_no_weights(tmp_path: Path) -> None:
    # 16 windows of 64 patches: 64 x 64 numbers for each, which the exporter computes.
    sizes = {"image_size": 64, "window_size": 8, "depths": [2], "num_heads": [2]}
    source = save_classifier(tmp_path / "swin", "swin", **sizes)
    with unproven():
        export_folder(source, tmp_path / "onnx", ExportRequest())
    pixels = np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)
    np.testing.assert_allclose(
        classified(tmp_path / "onnx", pixels), expected(source, pixels), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("compressed", [False, True])
def test_a_skeleton_holds_no_matrix_of_any_classifier(
    compressed: bool, sources: dict[str, Path], checkpoints: dict[str, Path]
) -> None:
    for folder in (checkpoints if compressed else sources).values():
        skeleton, whole = Skeleton.load(folder, torch.float32), load_checkpoint(folder)
        stored = dict(whole.named_parameters())
        assert stored.keys() == dict(skeleton.model.named_parameters()).keys()
        for name, parameter in skeleton.model.named_parameters():
            layer = whole.get_submodule(name.rpartition(".")[0])
            if isinstance(layer, nn.Linear | nn.Conv2d) and name.endswith("weight"):
                assert parameter.untyped_storage().nbytes() == 4
                assert torch.equal(skeleton.matrices[name].read(), stored[name])
            else:  # positions and the biases of windows are computed with while tracing
                assert torch.equal(parameter, stored[name])


def test_an_export_loads_no_whole_classifier(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    read = StoredMatrix.read

    def reading(matrix: StoredMatrix) -> torch.Tensor:
        gc.collect()
        held.append(sum(given() is not None for given in readings))
        values = read(matrix)
        readings.append(weakref.ref(values))
        return values

    readings: list[weakref.ref[torch.Tensor]] = []
    monkeypatch.setattr(StoredMatrix, "read", reading)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    with unproven(), old_objects_set_aside():
        export_folder(checkpoints["vit"], tmp_path / "onnx", ExportRequest())
    assert len(readings) > 8
    # Those of the group that is stacked, and the one being read.
    assert max(held) <= 3
