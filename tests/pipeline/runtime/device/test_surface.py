"""What the fake TensorRT has, and so what the runtime uses, is there in the real bindings."""

from __future__ import annotations

import ast
import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.runtime.device.engine import open_engine
from pipeline.runtime.device.session import DeviceSession
from pipeline.runtime.sessions.onnx_session import OnnxSession
from tests.support.fake_gpu.board import FAKES, Board, half_engine
from tests.support.fake_gpu.surface import CLASSES, names_of, names_of_wheel

# By `python tests/support/fake_gpu/surface.py`, of three wheels of PyPI's tensorrt-cu12-bindings.
REAL = json.loads((FAKES / "surface.json").read_text(encoding="utf-8"))


def fake_of(version: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("FAKE_TENSORRT", version)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    module = importlib.import_module("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


def attributes_set_by(class_name: str) -> set[str]:
    """Public attributes that the fake gives to the objects of a class."""
    sources = [path.read_text(encoding="utf-8") for path in sorted(FAKES.glob("tensorrt*.py"))]
    found = set()
    for node in (node for source in sources for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            parts = [part for part in ast.walk(node) if isinstance(part, ast.Attribute)]
            own = [part for part in parts if ast.unparse(part.value) == "self"]
            found |= {part.attr for part in own if isinstance(part.ctx, ast.Store)}
    return {name for name in found if not name.startswith("_")}


@pytest.mark.parametrize("version", sorted(REAL))
def test_the_fake_has_no_name_that_the_real_one_lacks(
    version: str, board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = REAL[version]
    faked = names_of(fake_of(version, monkeypatch))
    assert set(faked) <= set(real)
    assert set(faked) >= set(CLASSES) - {"IStreamReader", "IStreamReaderV2", "SeekPosition"}
    for name, found in faked.items():
        assert {*found, *attributes_set_by(name)} - set(real[name]) == set(), name
    # The readers of a plan are the one difference between versions that the runtime minds.
    readers = {"IStreamReader", "IStreamReaderV2"}
    assert readers & set(faked) == readers & set(real)


def test_the_names_on_file_are_those_of_the_real_bindings() -> None:
    root = os.environ.get("SKIPCAT_TENSORRT_BINDINGS")
    if root is None:
        pytest.skip("SKIPCAT_TENSORRT_BINDINGS names no folder of unpacked wheels")
    for version, names in REAL.items():
        assert names_of_wheel(Path(root, version)) == names


@pytest.mark.parametrize(
    ("version", "profile"),
    [
        ("10.3.0", "compat"),
        ("10.3.0", "compat-static"),
        ("10.16.1.11", "opset24"),
        ("11.4.0.106", "opset24"),
    ],
)
def test_each_version_builds_and_runs(
    version: str, profile: str, board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_of(version, monkeypatch)
    source, folder = half_engine(tmp_path, profile)
    session, reference = DeviceSession(open_engine(folder, board.driver())), OnnxSession(source)
    ids = np.arange(6, dtype=np.int64)[None]
    np.testing.assert_allclose(session.forward(ids), reference.forward(ids), atol=0.01)
    fake_of("10.13.0", monkeypatch)
    with pytest.raises(InputError, match="another TensorRT version"):
        open_engine(folder, board.driver())


def test_tensorrt_10_3_is_refused_a_graph_that_it_does_not_know(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_of("10.3.0", monkeypatch)
    with pytest.raises(InputError, match="too old for the export profile 'opset24'"):
        half_engine(tmp_path, "opset24")
