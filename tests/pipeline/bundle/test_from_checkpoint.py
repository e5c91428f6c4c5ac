"""A checkpoint packed for a board, its engine built there, and held to what ONNX Runtime says."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from pipeline.cli.main import main
from pipeline.errors import ResourceError, UsageError
from pipeline.runtime.device import preflight
from pipeline.runtime.device.build import check_build
from pipeline.runtime.language_model import LanguageModel
from pipeline.runtime.sequence import Decoding
from tests.support.bundles import (
    contents,
    flip_a_weight,
    overflow_in_a_norm,
    program,
    record_of,
    swap_query_and_key,
)
from tests.support.fake_gpu.board import Board, board, fake_plugin
from tests.support.families import save_family
from tests.support.tiny_decoder import LAYERS, save_tiny_folder, shared_folder

__all__ = ["board"]
PROFILES = {"6.2": ("10.3.0", "compat-static"), "7.2": ("10.16.2", "opset24")}
LENGTH = "64"


def pack(source: Path, output: Path, jetpack: str = "6.2", *more: str) -> int:
    board = ["--device", "orin-nano-8gb", "--jetpack", jetpack, "--max-length", LENGTH]
    return main(["bundle", str(source), "-o", str(output), *board, *more])


def shared_bundle(jetpack: str) -> Path:
    """A bundle of the tiny model that no test writes to."""

    def make(root: Path) -> None:
        assert pack(save_tiny_folder(root / "model"), root / f"bundle-{jetpack}", jetpack) == 0

    return shared_folder(f"bundle-{jetpack}", make, "bundle.json")


def copied(jetpack: str, folder: Path) -> Path:
    shutil.copytree(shared_bundle(jetpack), folder)
    return folder


@pytest.mark.parametrize("jetpack", ["6.2", "7.2"])
def test_an_engine_is_built_on_the_board_and_gives_onnx_runtimes_tokens(
    jetpack: str, board: Board, tmp_path: Path
) -> None:
    folder = copied(jetpack, tmp_path / "bundle")
    version, profile = PROFILES[jetpack]
    assert record_of(folder)["tensorrt_version"] == version
    assert json.loads((folder / "model/export.json").read_text())["profile"] == profile
    done = program(board, folder, "preflight", folder, version=version)
    assert done.returncode == 0, done.stderr
    assert "can be built here" in done.stdout
    done = program(board, folder, "run", folder, "-p", "x", version=version)
    assert done.returncode == 3
    assert "skipcat-device build" in done.stderr
    done = program(board, folder, "build", folder, "--json", version=version)
    assert done.returncode == 0, done.stderr
    checks = json.loads(done.stdout)["checks"]
    assert len([one for one in checks if one["name"].startswith("the answer to")]) == 3
    assert min(one["cosine"] for one in checks) > 0.999
    prompt = ["-p", "Once upon a time", "--max-new-tokens", "12"]
    done = program(board, folder, "run", folder, *prompt, version=version)
    assert done.returncode == 0, done.stderr
    model = LanguageModel.open(folder / "model")
    expected = model.chat([{"role": "user", "content": prompt[1]}], Decoding(max_new_tokens=12))
    assert done.stdout == expected.text + "\n"
    manifest = json.loads((folder / "engine/manifest.json").read_text())
    assert manifest["decode_profile"] == "shared"
    assert manifest["workspace_bytes"] is not None
    assert manifest["engine_layers"]["readable"]
    for verb in ("preflight", "selftest"):
        done = program(board, folder, verb, folder, version=version)
        assert done.returncode == 0, done.stderr
    done = program(board, folder, "build", folder, version=version)
    assert done.returncode == 2
    assert "exists already" in done.stderr
    # What was built goes on to boards like this one.
    built = ["bundle", str(folder / "engine"), "--onnx", str(folder / "model")]
    assert main([*built, "-o", str(tmp_path / "of-engine")]) == 0
    done = program(board, tmp_path / "of-engine", "build", tmp_path / "of-engine", version=version)
    assert done.returncode == 3
    assert "brings an engine, and no graph" in done.stderr


def test_a_bundle_is_the_same_twice_and_says_what_it_expects_and_from_what(tmp_path: Path) -> None:
    source = save_tiny_folder(tmp_path / "model")
    for number in "12":
        assert pack(source, tmp_path / number / "a") == 0
    first = contents(tmp_path / "1/a")
    assert first == contents(tmp_path / "2/a")
    record = record_of(tmp_path / "1/a")
    assert {*record["files"]} == {*first} - {"bundle.json"}
    predicted = record["predicted"]
    assert not predicted["measured"]
    assert [row["engine"] for row in predicted["rows"]] == ["ours"]
    assert predicted["rows"][0]["model"] == "model"
    assert predicted["rows"][0]["context"] == int(LENGTH) - 1
    assert "data sheets" in predicted["devices"][0]["source"]
    assert {*predicted["fits"]} == {"Edge-LLM", "llama.cpp"}
    assert str(tmp_path) not in json.dumps(record)


def test_without_a_gpu_or_with_a_plugin_that_is_not_there_nothing_is_built(
    board: Board, tmp_path: Path
) -> None:
    folder = copied("7.2", tmp_path / "bundle")
    done = program(board, folder, "build", folder, "--plugin", tmp_path / "none.so")
    assert (done.returncode, "plugin library is missing" in done.stderr) == (3, True)
    (tmp_path / "libcuda.so.1").write_bytes(b"no library")
    nowhere = Board(tmp_path / "libcuda.so.1", board.cuda)
    done = program(nowhere, folder, "build", folder)
    assert (done.returncode, "on the GPU that runs it" in done.stderr) == (3, True)
    assert not (folder / "engine").exists()


def test_python_3_10_builds_it(board: Board, tmp_path: Path) -> None:
    python = os.environ.get("SKIPCAT_PYTHON310") or shutil.which("python3.10")
    needed = (
        "import sys, numpy, tokenizers, jinja2, onnx, onnxruntime; assert sys.version_info[1] == 10"
    )
    if python is None or subprocess.run([python, "-c", needed], capture_output=True).returncode:
        pytest.skip("no Python 3.10 with numpy, tokenizers, jinja2, onnx and onnxruntime")
    folder = copied("6.2", tmp_path / "bundle")
    done = program(board, folder, "build", folder, python=python, version="10.3.0")
    assert done.returncode == 0, done.stderr


def compressed(folder: Path) -> Path:
    """A checkpoint with block-skip layers."""
    source = save_family(folder / "source", "smollm")
    sizes = ["--calibration", "self", "--windows", "4", "--window-length", "32"]
    command = ["compress", "-m", str(source), "-o", str(folder / "small"), "--keep-params", "0.6"]
    assert main([*command, "--method", "skipcat", *sizes]) == 0
    return folder / "small"


def graph_of(folder: Path, name: str) -> tuple[dict[str, Any], onnx.ModelProto]:
    work = record_of(folder)["build"]["graphs"][name]["work"]
    return work, onnx.load(folder / "model" / work["onnx_path"], load_external_data=False)


@pytest.mark.slow
def test_a_compressed_model_has_a_graph_for_boards_with_the_plugin_and_one_for_others(
    board: Board, tmp_path: Path
) -> None:
    source = compressed(tmp_path)
    folder = tmp_path / "bundle"
    assert pack(source, folder) == 0
    work, graph = graph_of(folder, "plugin")
    assert work["block_skip_nodes"] > 0
    assert not [one.name for one in graph.functions if one.name.startswith("BlockSkip")]
    other, bodies = graph_of(folder, "function bodies")
    assert other["plugin"] is None
    assert [one.name for one in bodies.functions if one.name.startswith("BlockSkip")]
    done = program(board, folder, "build", folder, version="10.3.0")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((folder / "engine/manifest.json").read_text())
    assert manifest["block_skip"]["path"] == "function body"
    # TensorRT 10.7 and newer takes a plugin where there is a body, too: so the fake can compute it.
    assert pack(source, tmp_path / "newer", "7.2") == 0
    library = tmp_path / "newer/plugin/lib/libskipcat_block_skip.so"
    library.parent.mkdir()
    library.write_text("plugins: BlockSkipLinear BlockSkipLinearIndexed\n")
    done = program(board, tmp_path / "newer", "build", tmp_path / "newer", version="10.16.2")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "newer/engine/manifest.json").read_text())
    assert manifest["block_skip"]["path"] == "plugin"
    assert manifest["block_skip"]["plugin"]["library"] == library.name


def test_with_the_plugin_a_jetpack_6_2_writes_its_cache_in_place(
    board: Board, tmp_path: Path
) -> None:
    folder = copied("6.2", tmp_path / "bundle")
    work, graph = graph_of(folder, "plugin")
    assert (work["onnx_profile"], work["cache_nodes"]) == ("compat-static", 2 * LAYERS)
    assert not graph.functions
    other, bodies = graph_of(folder, "function bodies")
    assert (other["onnx_profile"], other["cache_nodes"]) == ("compat", 0)
    assert "CacheWrite" not in [node.op_type for node in bodies.graph.node]
    (folder / "plugin/lib").mkdir()
    library = fake_plugin(folder / "plugin/lib")
    library.rename(library.with_name("libskipcat_block_skip.so"))
    done = program(board, folder, "build", folder, "--json", version="10.3.0")
    assert done.returncode == 0, done.stderr
    checks = json.loads(done.stdout)["checks"]
    assert min(one["cosine"] for one in checks) > 0.999
    manifest = json.loads((folder / "engine/manifest.json").read_text())
    assert manifest["cache_write"] == {"nodes": 2 * LAYERS, "path": "plugin"}
    assert manifest["block_skip"]["plugin"]["library"] == "libskipcat_block_skip.so"
    prompt = ["-p", "Once upon a time", "--max-new-tokens", "12"]
    done = program(board, folder, "run", folder, *prompt, version="10.3.0")
    assert done.returncode == 0, done.stderr
    assert "no CUDA graph" not in done.stderr
    model = LanguageModel.open(folder / "model")
    expected = model.chat([{"role": "user", "content": prompt[1]}], Decoding(max_new_tokens=12))
    assert done.stdout == expected.text + "\n"


def test_the_plugins_sources_stand_alone(tmp_path: Path) -> None:
    folder = shared_bundle("6.2") / "plugin"
    shutil.copytree(folder, tmp_path / "plugin")
    done = subprocess.run(
        ["sh", str(tmp_path / "plugin/build.sh"), "--help"],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"]},
    )
    assert done.returncode == 0, done.stderr
    assert "--architectures" in done.stdout
    assert (folder / "trt_plugins/block_skip/CMakeLists.txt").is_file()
    assert (folder / "trt_plugins/latent_attention/latent_plugin.cpp").is_file()
    assert (folder / "trt_plugins/cache_write/cache_write_plugin.cpp").is_file()


@pytest.mark.parametrize("machine", [183, 62])
def test_a_plugin_library_has_to_be_a_jetsons(
    machine: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library = tmp_path / "lib.so"
    library.write_bytes(b"\x7fELF" + bytes(14) + struct.pack("<H", machine) + bytes(100))
    source = save_tiny_folder(tmp_path / "model")
    status = pack(source, tmp_path / "a", "6.2", "--plugin", str(library))
    assert status == (0 if machine == 183 else 3)
    if machine == 183:
        assert "plugin/lib/libskipcat_block_skip.so" in record_of(tmp_path / "a")["files"]
    else:
        assert "not for a Jetson" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [flip_a_weight, swap_query_and_key, overflow_in_a_norm])
def test_a_build_of_something_else_fails_its_selftest(
    damage: Callable[[Path], str], board: Board, tmp_path: Path
) -> None:
    folder = copied("6.2", tmp_path / "bundle")
    said = damage(folder)
    done = program(board, folder, "build", folder, version="10.3.0")
    assert done.returncode == 5, done.stderr
    assert said in done.stderr


@pytest.mark.parametrize(
    ("described", "status", "said"),
    [
        ({"gpu": {"compute_capability": [11, 0]}}, 3, "for another GPU"),
        ({"tensorrt": "8.6.2"}, 3, "too old"),
        ({"tensorrt": "10.3.0"}, 3, "for a newer TensorRT"),
        ({"memory": {"available_bytes": 10**8, "swap_bytes": 0}}, 4, "swap"),
        ({"gpu": {"compute_capability": [8, 7]}}, 0, "not looked at: free memory"),
    ],
)
def test_preflight_holds_a_bundle_against_a_described_board(
    described: dict[str, Any], status: int, said: str, board: Board, tmp_path: Path
) -> None:
    path = tmp_path / "board.json"
    path.write_text(json.dumps({"schema": 1} | described))
    folder = shared_bundle("7.2")
    done = program(board, folder, "preflight", folder, "--device", path)
    assert done.returncode == status, done.stderr
    assert said in done.stdout + done.stderr


def test_weights_that_the_system_gives_no_buffer_for_are_refused_before_the_build(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    described = {
        "schema": 1,
        "jetpack": "L4T 36.4.7: JetPack 6.1 or 6.2, TensorRT 10.3",
        "memory": {"total_bytes": 7_608 << 20, "available_bytes": 6 << 30},
    }
    assert check_build(shared_bundle("6.2"), described)
    monkeypatch.setattr(preflight, "LARGEST_BUFFER_BYTES", 1000)
    with pytest.raises(ResourceError, match=r"36\.4\.7 gives no piece of memory"):
        check_build(shared_bundle("6.2"), described)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--jetpack", "6.2"), 2, "packed for a board"),
        (("--device", "orin-nano-8gb"), 2, "packed for a board"),
        (("--device", "rtx-4090", "--jetpack", "6.2"), 2, "not for this device"),
        (("--device", "thor", "--jetpack", "6.2"), 2, "7.2 for Orin and Thor"),
        (("--device", "orin-nano-9gb", "--jetpack", "6.2"), 2, "no such device"),
        (("--device", "thor", "--jetpack", "7.2", "--onnx", "."), 2, "leave --onnx out"),
    ],
)
def test_what_cannot_be_packed_is_refused_before_any_work(
    arguments: tuple[str, ...], status: int, said: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source = save_tiny_folder(tmp_path / "model")
    assert main(["bundle", str(source), "-o", str(tmp_path / "a"), *arguments]) == status
    assert said in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_a_jetpack_is_for_the_gpus_of_its_boards() -> None:
    from pipeline.bench.devices import DEVICES
    from pipeline.bundle.jetpack import JETPACKS
    from pipeline.gpu import ORIN, THOR

    assert JETPACKS["7.2"].capability_of(DEVICES["thor"]) == THOR
    assert JETPACKS["7.2"].capability_of(DEVICES["agx-orin-64gb"]) == ORIN
    with pytest.raises(UsageError, match="not for this device"):
        JETPACKS["7.2"].capability_of(DEVICES["dgx-spark"])


def test_the_jetpacks_of_the_command_are_those_that_are_known() -> None:
    from pipeline.bundle.jetpack import JETPACKS
    from pipeline.cli.bundle import _JETPACKS

    assert (*JETPACKS,) == _JETPACKS


def test_codes_are_left_to_the_plugin_or_go_through_dequantize_linear(tmp_path: Path) -> None:
    source = save_family(tmp_path / "source", "smollm")
    rounding = ["--method", "rtn", "--weights", "int8-row-sym", "--runtime", "tensorrt"]
    assert main(["compress", "-m", str(source), "-o", str(tmp_path / "small"), *rounding]) == 0
    assert pack(tmp_path / "small", tmp_path / "bundle") == 0
    work, graph = graph_of(tmp_path / "bundle", "plugin")
    assert work["coded_nodes"] > 0
    other, bodies = graph_of(tmp_path / "bundle", "function bodies")
    assert (other["coded_nodes"], other["dequantized"] > 0) == (0, True)
    made = [node.op_type for node in bodies.graph.node]
    assert made.count("DequantizeLinear") == other["dequantized"]
    assert "DequantizeLinear" not in [node.op_type for node in graph.graph.node]
    names = {
        entry.value
        for model in (graph, bodies)
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert names == {"model.onnx.data"}
