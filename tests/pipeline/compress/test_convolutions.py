"""`skipcat compress --method int8` of a driving network: a checkpoint that loads and exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from pipeline.checkpoint.folder import load_checkpoint
from pipeline.checkpoint.modeling_quantized import Int8Conv
from pipeline.checkpoint.skeleton import Skeleton
from pipeline.cli.main import main
from pipeline.compress.request import CompressRequest
from pipeline.compress.run import compress_to_folder, plan_only
from pipeline.driving.network import QyolopConfig, QyolopForDrivingPerception
from pipeline.driving.preprocess import QyolopImageProcessor
from pipeline.errors import InputError, UsageError
from pipeline.export.contract import DRIVING_MAPS, PIXEL_VALUES
from pipeline.export.int8_nodes import require_int8_runtime
from pipeline.export.request import ExportRequest
from pipeline.export.trace_driving import trace_driving

SIZE = (32, 64)
CONVOLUTIONS = 65


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("driving") / "net"
    model = QyolopForDrivingPerception(QyolopConfig(SIZE, 2))
    with torch.no_grad():
        for _ in range(8):  # norms that know their inputs
            model(torch.rand(4, 3, *SIZE))
    model.eval().save_pretrained(folder)
    QyolopImageProcessor.for_size(SIZE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(3):
        pixels = rng.integers(0, 256, (40, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def rounded(network: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("rounded") / "int8"
    command = ["compress", "-m", str(network), "-o", str(output), "--method", "int8"]
    assert main([*command, "--runtime", "cpu", "--calibration", str(pictures)]) == 0
    return output


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_the_checkpoint_loads_as_it_was_rounded_and_says_how(
    rounded: Path, network: Path, pictures: Path
) -> None:
    model = load_checkpoint(rounded)
    assert sum(isinstance(module, Int8Conv) for module in model.modules()) == CONVOLUTIONS
    x = torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(2))
    own = QyolopForDrivingPerception.from_pretrained(network).eval()
    with torch.no_grad():
        a, b = own(x).boxes[0], model(x).boxes[0]
    assert 0 < float((a - b).square().mean()) < 1e-3 * float(a.square().mean())
    report, recipe = read(rounded, "report.json"), read(rounded, "recipe.json")
    assert (report["runtime"], report["totals"]["rounded"]) == ("cpu", CONVOLUTIONS)
    assert recipe["calibration"]["images"] == 3
    assert recipe["method"]["convolutions"]["observer"] == "mse"
    assert str(pictures) not in json.dumps(recipe)
    card = (rounded / "README.md").read_text(encoding="utf-8")
    assert "65 of 65" in card
    assert "--profile cpu" in card
    assert "not trained under rounding" in card


def compressed(network: Path, pictures: Path, output: Path, method: str, runtime: str) -> Path:
    command = ["compress", "-m", str(network), "-o", str(output), "--method", method]
    command += ["--runtime", runtime, "--calibration", str(pictures), "--windows", "1"]
    assert main(command) == 0
    return output


@pytest.mark.parametrize(
    ("method", "bits"),
    [("int4", (4, 4)), pytest.param("int6-kernels", (6, 8), marks=pytest.mark.slow)],
)
def test_fewer_bits_are_stored_as_such_and_cost_more(
    network: Path, pictures: Path, rounded: Path, tmp_path: Path, method: str, bits: tuple[int, int]
) -> None:
    made = compressed(network, pictures, tmp_path / "few", method, "tensorrt")
    report = read(made, "report.json")
    assert report["bits"] == {"kernels": bits[0], "activations": bits[1]}
    assert bits[1] == 8 or report["loss"] > read(rounded, "report.json")["loss"]
    model, own = load_checkpoint(made), load_checkpoint(rounded)
    for name, layer in model.named_modules():
        if isinstance(layer, Int8Conv):
            other: Any = own.get_submodule(name)
            numbers = layer.shape[1:].numel()
            assert layer.codes.shape == (layer.shape[0], -(-numbers * bits[0] // 8))
            assert layer.kernel.shape == other.kernel.shape
            assert 0 < int(layer.kernel.abs().max()) <= 2 ** (bits[0] - 1) - 1
    skeleton = Skeleton.load(made, torch.float32)
    if bits[1] == 8:
        require_int8_runtime(skeleton.model, "tensorrt", made)
        return
    with pytest.raises(InputError, match="not rounded for tensorrt") as caught:
        trace_driving(skeleton, ExportRequest(profile="opset24", dtype="float32"))
    assert "fewer bits of activations" in str(caught.value)


@pytest.mark.slow
def test_an_int8_checkpoint_takes_a_quarter_of_the_bytes_and_little_more(
    tmp_path: Path, pictures: Path
) -> None:
    """At the default width; names and scales of a smaller one weigh more."""
    torch.manual_seed(0)
    QyolopForDrivingPerception(QyolopConfig(SIZE)).eval().save_pretrained(tmp_path / "net")
    QyolopImageProcessor.for_size(SIZE).save_pretrained(tmp_path / "net")
    plain = (tmp_path / "net" / "model.safetensors").stat().st_size
    for method, most in (("int8-min-max", 0.27), ("int4-min-max", 0.15)):
        made = compressed(tmp_path / "net", pictures, tmp_path / method, method, "tensorrt")
        assert (made / "model.safetensors").stat().st_size <= most * plain


@pytest.mark.slow  # a run of the network for each of its convolutions
@pytest.mark.parametrize("most", [0.0, 0.5])
def test_a_budget_of_multiplications_keeps_convolutions_in_numbers(
    network: Path, pictures: Path, tmp_path: Path, most: float
) -> None:
    request = CompressRequest(
        str(network), method="int8", runtime="tensorrt", calibration=str(pictures), windows=1,
        keep_macs=most,
    )  # fmt: skip
    request.check()
    found = compress_to_folder(request, tmp_path / "mixed")["convolutions"]
    kept = [what["macs"] for what in found.values() if not what["rounded"]]
    assert sum(kept) <= most * sum(what["macs"] for what in found.values())
    assert bool(kept) == (most > 0)


@pytest.mark.slow  # a run of the network for each of its convolutions
def test_a_budget_of_bytes_keeps_the_most_sensitive_convolutions_in_numbers(
    network: Path, pictures: Path, tmp_path: Path
) -> None:
    request = CompressRequest(
        str(network), method="int8", runtime="tensorrt", calibration=str(pictures), windows=1,
        keep_bytes=1.0,
    )  # fmt: skip
    report = compress_to_folder(request, tmp_path / "mixed")
    found = report["convolutions"]
    kept = [name for name, what in found.items() if not what["rounded"]]
    assert 0 < len(kept) < CONVOLUTIONS
    assert all("loss" in what for what in found.values())
    model = load_checkpoint(tmp_path / "mixed")
    assert sum(isinstance(module, Int8Conv) for module in model.modules()) == CONVOLUTIONS - len(
        kept
    )
    with pytest.raises(InputError, match="budget is too small"):
        compress_to_folder(
            CompressRequest(
                str(network), method="int8", calibration=str(pictures), keep_bytes=0.01, windows=1
            ),
            tmp_path / "small",
        )
    assert not (tmp_path / "small").exists()


def test_the_checkpoint_runs(
    rounded: Path, pictures: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(rounded), "--image", str(pictures / "0.png"), "--json"]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": "int8-b32-sym"},
        {"calibration": "self"},
        {"runtime": "any"},
        {"dtype": "float16"},
        {"keep_macs": 1.5},
        {"keep_macs": 0.1, "keep_bytes": 0.5},
        {"keep_macs": 0.1, "method": "skipcat"},
    ],
)
def test_options_that_mean_nothing_here_are_refused(
    network: Path, pictures: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    settings = {"calibration": str(pictures), "method": "int8"} | changes
    command = ["compress", "-m", str(network), "-o", str(tmp_path / "out")]
    for name, value in settings.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    assert main(command) == UsageError.exit_status
    assert not (tmp_path / "out").exists()


def test_other_methods_and_other_models_are_told_apart(network: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="convolutions alone") as caught:
        compress_to_folder(CompressRequest(str(network)), tmp_path / "out")
    assert "--method int8" in str(caught.value)
    with pytest.raises(UsageError, match="no plan of ranks"):
        plan_only(CompressRequest(str(network), method="int8"))


def test_a_network_for_one_runtime_is_not_exported_for_the_other(rounded: Path) -> None:
    skeleton = Skeleton.load(rounded, torch.float32)
    with pytest.raises(InputError, match="not rounded for tensorrt"):
        trace_driving(skeleton, ExportRequest(profile="opset24", dtype="float32"))


@pytest.mark.slow
def test_the_export_gives_the_bits_of_pytorch(rounded: Path, tmp_path: Path) -> None:
    command = ["export", str(rounded), "-o", str(tmp_path / "onnx"), "--dtype", "float32"]
    assert main([*command, "--profile", "cpu"]) == 0
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"), options)
    x = torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(3))
    found = session.run(list(DRIVING_MAPS), {PIXEL_VALUES: x.numpy()})
    with torch.no_grad():
        maps = load_checkpoint(rounded)(x)
    for own, other in zip((*maps.boxes, maps.drivable, maps.lane), found, strict=True):
        np.testing.assert_array_equal(own.numpy(), other)
