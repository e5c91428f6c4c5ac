"""The program `skipcat-device`, in processes of its own that see the fake board and little else."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.runtime.language_model import LanguageModel
from pipeline.runtime.sequence import Decoding
from tests.support.fake_gpu.board import Board, board_engine
from tests.support.tiny_decoder import shared_export

ROOT = Path(__file__).parents[4]
# What a board does not have.
ABSENT = (
    "torch", "transformers", "scipy", "psutil", "rich", "click", "safetensors", "onnx", "filelock",
    "onnx_ir", "onnxscript", "accelerate", "gguf", "matplotlib", "PIL", "polygraphy",
)  # fmt: skip
START = (
    f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r})); sys.path.insert(0, {str(ROOT)!r});"
    "from pipeline.runtime.device.__main__ import main; sys.exit(main(sys.argv[1:]))"
)
ALLOWED = {"numpy", "tokenizers", "jinja2", "tensorrt", "pipeline"}
PROMPT = ("-p", "Once upon a time", "--max-new-tokens", "12")


def device(
    board: Board, *arguments: object, python: str = sys.executable, status: int = 0
) -> tuple[str, str]:
    """What the program says on stdout and stderr."""
    command = [python, "-c", START, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=board.environment())
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize("profile", ["opset24", "compat-static", "compat"])
def test_a_prompt_is_answered_as_onnx_runtime_answers_it(profile: str, board: Board) -> None:
    text, aside = device(board, "run", board_engine(profile, board), *PROMPT)
    model = LanguageModel.open(shared_export(profile))
    expected = model.chat([{"role": "user", "content": PROMPT[1]}], Decoding(max_new_tokens=12))
    assert text == expected.text + "\n"
    assert ("no CUDA graph" in aside) == (profile == "compat")


def test_nothing_is_said_where_nobody_reads(board: Board) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", START, "describe"]
    done = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, text=True, env=board.environment()
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_an_answer_can_be_json(board: Board) -> None:
    text, _ = device(board, "run", board_engine("opset24", board), *PROMPT, "--json", "--raw")
    assert json.loads(text)["new_tokens"] == 12


@pytest.mark.parametrize("profile", ["opset24", "compat-static", "compat"])
def test_an_engine_that_is_right_agrees_with_itself(profile: str, board: Board) -> None:
    text, _ = device(board, "selftest", board_engine(profile, board), "--json")
    found = json.loads(text)
    assert found["captured"] == (profile != "compat")
    assert all(check["cosine"] > 0.99999 for check in found["checks"])


def test_an_engine_fits_the_board_it_was_built_for(board: Board) -> None:
    text, _ = device(board, "preflight", board_engine("opset24", board), "--json")
    found = json.loads(text)
    assert found["unknown"] == []
    assert sum(found["needed_bytes"].values()) <= found["available_bytes"]


def test_a_description_of_a_board_serves_on_another_machine(board: Board, tmp_path: Path) -> None:
    described = json.loads(device(board, "describe")[0])
    assert described["gpu"]["compute_capability"] == [8, 7]
    described["memory"]["available_bytes"] = 10**9
    path = tmp_path / "board.json"
    path.write_text(json.dumps(described), encoding="utf-8")
    folder = board_engine("opset24", board)
    _, said = device(board, "preflight", folder, "--device", path, status=4)
    assert "needs more memory than the device has free" in said
    assert "drop_caches" in said


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("run", "no-such-folder", "-p", "x"), 3, "The folder has no tokenizer"),
        (("selftest", "no-such-folder"), 3, "This is not an engine folder"),
        (("preflight", "no-such-folder"), 3, "This is not an engine folder"),
        (("fly",), 2, "invalid choice"),
        (("run",), 2, "required"),
        (("build", "no-such-folder"), 3, "bundle.json"),
    ],
)
def test_what_cannot_be_done_is_said(
    arguments: tuple[str, ...], status: int, said: str, board: Board
) -> None:
    assert said in device(board, *arguments, status=status)[1]


def test_without_a_driver_the_reason_is_given(board: Board, tmp_path: Path) -> None:
    empty = Board(tmp_path / "libcuda.so.1", board.cuda)
    (tmp_path / "libcuda.so.1").write_bytes(b"no library")
    folder = board_engine("opset24", board)
    _, said = device(empty, "selftest", folder, status=3)
    assert "There is no usable NVIDIA driver" in said
    text, said = device(empty, "describe")
    assert json.loads(text)["gpu"] is None
    assert "no usable NVIDIA driver" in said


def test_python_3_10_runs_it(board: Board) -> None:
    # JetPack 6.2's. Of the libraries, onnxruntime is for the fake TensorRT alone.
    python = os.environ.get("SKIPCAT_PYTHON310") or shutil.which("python3.10")
    needed = "import sys, numpy, tokenizers, jinja2, onnxruntime; assert sys.version_info[1] == 10"
    if python is None or subprocess.run([python, "-c", needed], capture_output=True).returncode:
        pytest.skip("no Python 3.10 with numpy, tokenizers, jinja2 and onnxruntime")
    folder = board_engine("compat", board)  # of opset 18, which an old ONNX Runtime knows
    assert (
        device(board, "run", folder, *PROMPT, python=python)[0]
        == (device(board, "run", folder, *PROMPT)[0])
    )
    device(board, "selftest", folder, python=python)


def test_its_files_are_python_3_10_and_import_what_a_board_has() -> None:
    waiting, seen = ["pipeline.runtime.device.__main__"], set()
    waiting += [f"pipeline.runtime.device.{path.stem}" for path in _own_files()]
    waiting += ["pipeline.runtime.tokenizer", "pipeline.runtime.generate"]
    waiting += ["pipeline.engine.worker", "pipeline.engine.standard"]  # of `build`
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        tree = ast.parse(_source(name), feature_version=(3, 10))
        for imported in _imports_at_once(tree):
            top = imported.partition(".")[0]
            assert top in ALLOWED or top in sys.stdlib_module_names, f"{name} imports {imported}"
            if top == "pipeline":
                waiting.append(imported)
    assert "pipeline.model.source" not in seen


def _own_files() -> list[Path]:
    return list((ROOT / "pipeline/runtime/device").glob("[a-z]*.py"))


def _source(name: str) -> str:
    path = ROOT.joinpath(*name.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return path.read_text(encoding="utf-8")


def _imports_at_once(tree: ast.Module) -> list[str]:
    """Modules that a module needs before it can be used: outside functions and type checking."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module != "pipeline":
            found.append(node.module)
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found
