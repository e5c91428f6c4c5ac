from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from pipeline.artefact import sha256_of_file
from pipeline.bundle.write import write_bundle
from pipeline.cli.main import main
from pipeline.errors import InputError, UsageError
from pipeline.runtime.device.bundle import require_reference
from pipeline.runtime.device.engine import open_engine
from pipeline.runtime.device.session import DeviceSession
from tests.support.bundles import contents, program
from tests.support.fake_gpu.board import Board, board, board_engine
from tests.support.tiny_decoder import shared_export

__all__ = ["board"]


def bundle(board: Board, folder: Path, profile: str = "opset24") -> Path:
    write_bundle(board_engine(profile, board), shared_export(profile), folder)
    return folder


def sign(folder: Path) -> None:
    """Make the bundle's record say that its files are as they should be."""
    manifest = folder / "engine/manifest.json"
    made, plan = json.loads(manifest.read_text()), folder / "engine/engine.plan"
    made["plan"] = {"bytes": plan.stat().st_size, "sha256": sha256_of_file(plan)}
    manifest.write_text(json.dumps(made))
    record = json.loads((folder / "bundle.json").read_text())
    record["files"] = {name: sha256_of_file(folder / name) for name in record["files"]}
    (folder / "bundle.json").write_text(json.dumps(record))


def change_plan(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Change weights of the fake's plan, which ends with an ONNX graph."""
    path = folder / "engine/engine.plan"
    magic, head, graph = path.read_bytes().split(b"\n", 2)
    model = onnx.load_from_string(graph)
    weights = {one.name: numpy_helper.to_array(one).copy() for one in model.graph.initializer}
    change(weights)
    for one in model.graph.initializer:
        one.CopyFrom(numpy_helper.from_array(weights[one.name], one.name))
    changed = model.SerializeToString()
    header = json.loads(head) | {"bytes": len(changed)}
    path.write_bytes(b"\n".join([magic, json.dumps(header).encode(), changed]))


def swap_two_matrices(weights: dict[str, np.ndarray]) -> None:
    """Two of one shape, as a query and a key projection would be without grouped heads."""
    matrices = [name for name, values in weights.items() if values.ndim == 2]
    pair = next(
        (first, second)
        for first in matrices
        for second in matrices
        if first < second and weights[first].shape == weights[second].shape
    )
    first, second = (weights[name] for name in pair)
    weights[pair[0]], weights[pair[1]] = second, first


def overflow_in_a_norm(weights: dict[str, np.ndarray]) -> None:
    norm = next(n for n, v in weights.items() if v.ndim == 1 and v.dtype == np.float32)
    weights[norm][0] = np.inf


def test_a_bundle_is_the_same_twice_and_its_program_answers(board: Board, tmp_path: Path) -> None:
    first, second = bundle(board, tmp_path / "1/a"), bundle(board, tmp_path / "2/a")
    assert contents(first) == contents(second)
    done = program(board, first, "selftest", first, "--json")
    assert done.returncode == 0, done.stderr
    checks = json.loads(done.stdout)["checks"]
    assert len(checks) == 7
    assert min(check["cosine"] for check in checks) > 0.9999
    done = program(board, first, "run", first, "-p", "Once", "--max-new-tokens", "6")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 1


def test_python_3_10_runs_the_program(board: Board, tmp_path: Path) -> None:
    python = os.environ.get("SKIPCAT_PYTHON310") or shutil.which("python3.10")
    needed = "import sys, numpy, tokenizers, jinja2, onnxruntime; assert sys.version_info[1] == 10"
    if python is None or subprocess.run([python, "-c", needed], capture_output=True).returncode:
        pytest.skip("no Python 3.10 with numpy, tokenizers, jinja2 and onnxruntime")
    folder = bundle(board, tmp_path / "a", "compat")
    for arguments in (("selftest", folder), ("run", folder, "-p", "x", "--max-new-tokens", "3")):
        done = program(board, folder, *arguments, python=python)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("change", [swap_two_matrices, overflow_in_a_norm])
def test_weights_that_are_not_the_references_fail_the_selftest(
    change: Callable[[dict[str, np.ndarray]], None], board: Board, tmp_path: Path
) -> None:
    folder = bundle(board, tmp_path / "a")
    change_plan(folder, change)
    sign(folder)
    done = program(board, folder, "selftest", folder)
    assert done.returncode == 5, done.stderr


def flip_a_byte_of_the_plan(folder: Path) -> str:
    plan = folder / "engine/engine.plan"
    content = bytearray(plan.read_bytes())
    content[-1] ^= 1
    plan.write_bytes(content)
    return "not the one that was packed"


def lose_a_file(folder: Path) -> str:
    (folder / "engine/tokenizer.json").unlink()
    return "not the one that was packed"


def take_another_tokenizer(folder: Path) -> str:
    path = folder / "engine/tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    words: dict[str, Any] = content["model"]["vocab"]
    words["a"], words["e"] = words["e"], words["a"]
    path.write_text(json.dumps(content), encoding="utf-8")
    sign(folder)
    return "The tokenizer is not the one"


@pytest.mark.parametrize("damage", [flip_a_byte_of_the_plan, lose_a_file, take_another_tokenizer])
def test_a_bundle_that_is_not_whole_fails_the_selftest(
    damage: Callable[[Path], str], board: Board, tmp_path: Path
) -> None:
    folder = bundle(board, tmp_path / "a")
    said = damage(folder)
    done = program(board, folder, "selftest", folder)
    assert done.returncode == 5, done.stderr
    assert said in done.stderr


def test_a_graph_that_sums_in_another_order_passes(board: Board, tmp_path: Path) -> None:
    folder = bundle(board, tmp_path / "a", "compat")
    other = DeviceSession(open_engine(board_engine("opset24", board), board.driver()))
    assert all(cosine > 0.9999 for _, cosine in require_reference(folder, other))


def test_a_bundle_for_a_device_that_is_too_small_is_not_written(
    board: Board, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = tmp_path / "board.json"
    device.write_text(
        json.dumps(
            {
                "schema": 1,
                "tensorrt": "10.16.1.11",
                "gpu": {"compute_capability": [8, 7], "shares_memory": True},
                "memory": {"available_bytes": 500_000_000},
            }
        )
    )
    folders = [str(board_engine("opset24", board)), "--onnx", str(shared_export("opset24"))]
    output = ["-o", str(tmp_path / "a")]
    assert main(["bundle", *folders, *output, "--device", str(device)]) == 4
    assert "more memory than the device has" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    assert main(["bundle", *folders, *output]) == 0
    assert "files, needs about" in capsys.readouterr().out


def test_folders_that_do_not_belong_together_are_refused(board: Board, tmp_path: Path) -> None:
    engine = board_engine("opset24", board)
    with pytest.raises(InputError, match=r"another hash of model\.onnx"):
        write_bundle(engine, shared_export("compat"), tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/mine.txt").write_text("mine")
    with pytest.raises(UsageError):
        write_bundle(engine, shared_export("opset24"), tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]
