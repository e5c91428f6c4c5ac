"""A board to test on: the fake driver compiled, the fake TensorRT importable, and engines.

They come from the product's own builder, whose worker parses and builds with the fake.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.engine.build import build_engine, run_plan
from pipeline.engine.manifest import MANIFEST_FILE
from pipeline.engine.plan import EnginePlan, EngineRequest
from pipeline.engine.profiles import Limits
from pipeline.engine.target import Target
from pipeline.engine.worker_protocol import WorkerRequest
from pipeline.export.contract import PLUGIN_OPS, PROFILES
from pipeline.export.onnx_folder import read_onnx_folder
from pipeline.gpu import ORIN
from pipeline.runtime.device.driver import Driver
from tests.support.tiny_decoder import MAX_LENGTH, shared_export, shared_folder
from tests.support.tiny_graph import write_export

FAKES = Path(__file__).parent
MAX_BATCH, MAX_PREFILL = 2, 8
_TARGET = Target("tensorrt", ORIN, "a test")


@dataclass(frozen=True)
class Board:
    """The fake GPU of this process.

    Attributes:
        library: path of the fake `libcuda.so.1`.
        cuda: the same, loaded, with the functions that tests ask.
    """

    library: Path
    cuda: ctypes.CDLL

    def driver(self) -> Driver:
        """The driver of the fake GPU, as the product opens it."""
        return Driver(str(self.library))

    @property
    def complaints(self) -> str:
        """What was done that a real GPU would not forgive; empty so far."""
        return bytes(self.cuda.fake_complaints()).decode()

    @property
    def calls(self) -> int:
        """Calls of the driver so far."""
        return int(self.cuda.fake_calls())

    @property
    def allocations(self) -> int:
        """Pieces of memory that were asked for so far."""
        return int(self.cuda.fake_allocations())

    def environment(self) -> dict[str, str]:
        """For a process that is to see this board."""
        path = os.pathsep.join(filter(None, [str(FAKES), os.environ.get("PYTHONPATH", "")]))
        folder = str(self.library.parent)
        return {**os.environ, "PYTHONPATH": path, "LD_LIBRARY_PATH": folder}


@functools.cache
def _compiled() -> Path:
    """The fake driver's library; the test is skipped where there is no C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the fake driver")

    def make(root: Path) -> None:
        target = root / "fake_driver" / "libcuda.so.1"
        target.parent.mkdir()
        warnings = ["-Wall", "-Wextra", "-Werror", "-std=gnu11"]
        command = [compiler, *warnings, "-O1", "-shared", "-fPIC", str(FAKES / "libcuda.c")]
        subprocess.run([*command, "-o", str(target)], check=True)

    return shared_folder("fake_driver", make, "libcuda.so.1") / "libcuda.so.1"


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Iterator[Board]:
    """A board on which nothing was done wrong so far, and on which nothing may be by the end."""
    library = _compiled()
    monkeypatch.setenv("FAKE_LIBCUDA", str(library))
    monkeypatch.setenv("PYTHONPATH", str(FAKES))
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    module = importlib.import_module("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    cuda = ctypes.CDLL(str(library))
    cuda.fake_complaints.restype = ctypes.c_char_p
    cuda.fake_calls.restype = cuda.fake_allocations.restype = ctypes.c_long
    cuda.fake_limit_memory.argtypes = [ctypes.c_size_t]
    cuda.fake_forget_complaints()
    found = Board(library, cuda)
    yield found
    assert found.complaints == ""


def board_engine(profile: str, board: Board) -> Path:
    """An engine of `shared_export(profile)` for the fake board; not to be written to.

    In float32, which `plan_engine` would refuse, so that the whole suite shares one export.
    """

    def make(root: Path) -> None:
        folder = read_onnx_folder(shared_export(profile))
        plugin = fake_plugin(root) if folder.cache_nodes else None
        limits = Limits(MAX_BATCH, MAX_PREFILL, MAX_LENGTH, "separate")
        work = WorkerRequest(
            flavour="tensorrt",
            compute_capability=ORIN,
            onnx_path=folder.onnx_path.resolve(),
            profiles=tuple(limits.profiles_of(folder.inputs)),
            shared_weights=False,
            workspace_bytes=None,
            plugin=plugin,
            block_skip_nodes=0,
            onnx_profile=profile,
            cache_nodes=folder.cache_nodes,
        )
        plan = EnginePlan(_TARGET, folder, limits, work, 120.0, ())
        run_plan(plan, root / f"{profile}-engine")

    return shared_folder(f"{profile}-engine", make, MANIFEST_FILE)


def fake_plugin(folder: Path) -> Path:
    """A plugin library for the fake TensorRT, with all of our ops."""
    library = folder / "plugin.so"
    library.write_text(f"plugins: {' '.join(PLUGIN_OPS)}\n")
    return library.resolve()


def half_engine(folder: Path, profile: str) -> tuple[Path, Path]:
    """A float16 export of one layer in a new folder, and its engine for the fake board."""
    source = write_export(folder / "onnx", profile=profile)
    plugin = fake_plugin(folder) if PROFILES[profile].plugin_writes else None
    request = EngineRequest(_TARGET, max_batch=MAX_BATCH, max_prefill=MAX_PREFILL, plugin=plugin)
    build_engine(source, folder / "engine", request)
    return source, folder / "engine"
