"""The exported graph gives the maps that the driving network gives; engines build from it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from pipeline.driving.load import load_driving
from pipeline.engine.build import build_engine
from pipeline.engine.plan import EngineRequest
from pipeline.engine.target import Target
from pipeline.errors import InputError, UsageError
from pipeline.export import trace_driving
from pipeline.export.contract import DRIVING_MAPS
from pipeline.export.export import export_folder, prove_model
from pipeline.export.record import read_export_record
from pipeline.export.request import ExportRequest
from pipeline.model.task import DRIVING
from pipeline.runtime.sessions.driving_sessions import OnnxDriving, TorchDriving
from tests.support.tiny_driving import SIZE, pixels_of, save_driving, tiny_driving

SM86 = Target("rtx", (8, 6), "of a test")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_driving(tmp_path_factory.mktemp("driving") / "net")


@pytest.fixture(scope="module")
def exported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("onnx")
    wanted = {"float32": ExportRequest("cpu"), "float16": ExportRequest("compat", "float16")}
    for name, request in wanted.items():
        export_folder(source, folder / name, request)
    return {name: folder / name for name in wanted}


@pytest.mark.parametrize("optimised", [False, True])
@pytest.mark.parametrize("count", [1, 4])
def test_the_graph_gives_the_maps_of_the_network(
    count: int, optimised: bool, exported: dict[str, Path]
) -> None:
    session = OnnxDriving(exported["float32"], "onnx", optimised=optimised)
    own = session.maps(pixels_of(count))
    network = TorchDriving(tiny_driving(), "torch")
    wanted = network.maps(pixels_of(count))
    assert session.traits.map_shapes == network.traits.map_shapes
    assert (session.traits.labels, session.traits.size) == (("vehicle",), SIZE)
    for a, b in zip(
        (*own.boxes, own.drivable, own.lane),
        (*wanted.boxes, wanted.drivable, wanted.lane),
        strict=True,
    ):
        # Sums of some hundreds of products in another order, sixty times one after the other.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_half_precision_stays_close(exported: dict[str, Path]) -> None:
    own = OnnxDriving(exported["float16"], "onnx").maps(pixels_of(2))
    wanted = TorchDriving(tiny_driving(), "torch").maps(pixels_of(2))
    for a, b in ((own.drivable, wanted.drivable), (own.lane, wanted.lane)):
        # 11 bits, some thirty layers deep.
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-2 * np.abs(b).max())


def test_norms_are_folded_and_everything_is_said(exported: dict[str, Path]) -> None:
    folder = exported["float32"]
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    assert [value.name for value in model.graph.output] == list(DRIVING_MAPS)
    kinds = {node.op_type for node in model.graph.node}
    assert kinds == {"Conv", "Relu", "MaxPool", "Concat", "Resize", "DepthToSpace"}
    assert all(len(node.input) == 3 for node in model.graph.node if node.op_type == "Conv")
    record = read_export_record(folder, tasks=(DRIVING,))
    assert (record.pixel_values, record.labels) == ((3, *SIZE), ("vehicle",))
    assert record.weights == "float"
    assert record.anchors[1][0] == (21, 16)
    assert (folder / "preprocessor_config.json").is_file()


@pytest.mark.slow
def test_a_graph_without_its_norms_is_not_exported(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch's exporter folds them by itself, and multiplies what stands in for the weights.
    monkeypatch.setattr(trace_driving, "_fold_norms_", lambda skeleton: None)
    monkeypatch.setattr("pipeline.export.prove.sources_sha256", lambda: "of other code")
    with pytest.raises(InputError, match="would not compute what the model computes"):
        prove_model(load_driving(str(source)).model.config, ExportRequest())


@pytest.mark.parametrize("weights", ["int8", "stored"])
def test_weights_of_few_bits_are_refused(source: Path, tmp_path: Path, weights: str) -> None:
    with pytest.raises(UsageError):
        export_folder(source, tmp_path / "onnx", ExportRequest("cpu", weights=weights))
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [("anchors", [[[8, 7]]]), ("anchors", [[["a", 1]]] * 3), ("labels", []), ("labels", [1])],
)
def test_a_record_that_makes_no_sense_is_refused(
    exported: dict[str, Path], tmp_path: Path, field: str, value: object
) -> None:
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / name).symlink_to(exported["float32"] / name)
    record = json.loads((exported["float32"] / "export.json").read_text())
    (tmp_path / "export.json").write_text(json.dumps(record | {field: value}))
    with pytest.raises(InputError, match=f"'{field}'"):
        OnnxDriving(tmp_path, "onnx")


def test_an_engine_is_built_without_a_gpu(exported: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    request = EngineRequest(SM86, max_batch=4)
    manifest = build_engine(exported["float16"], tmp_path / "engine", request)
    assert manifest["limits"] == {"max_batch": 4}
    assert manifest["profiles"][0]["shapes"]["pixel_values"]["max"] == [4, 3, *SIZE]
    assert manifest["onnx"]["task"] == DRIVING
    assert list(manifest["onnx"]["labels"]) == ["vehicle"]
    assert len(manifest["onnx"]["anchors"]) == 3
    convolutions = sum(isinstance(m, torch.nn.Conv2d) for m in tiny_driving().modules())
    assert manifest["layer_types"]["CONVOLUTION"] == convolutions
    assert (tmp_path / "engine" / "preprocessor_config.json").is_file()


def test_a_fresh_process_loads_a_checkpoint_without_code_from_elsewhere(source: Path) -> None:
    code = (
        "import sys; from pathlib import Path; "
        "from pipeline.checkpoint.folder import load_checkpoint; "
        "print(type(load_checkpoint(Path(sys.argv[1]))).__name__)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(source)], capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["QyolopForDrivingPerception"]
