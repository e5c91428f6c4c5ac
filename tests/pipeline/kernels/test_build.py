"""The kernel library is compiled once, whole or not at all, and named after what it is made of."""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path

import pytest

from pipeline.errors import InputError, ResourceError
from pipeline.kernels import build
from pipeline.kernels.build import _compile_library, _library_name, build_library
from pipeline.kernels.interface import Device, Problem, open_library
from pipeline.kernels.op import _make_counters
from pipeline.quantize.formats import RUNTIMES
from pipeline.quantize.kernel_codes import kernel_bits, kernel_block
from trt_plugins.toolchain import local_nvcc


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def library(cache: Path, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    if local_nvcc() is None:
        pytest.skip("nvcc is not installed")
    monkeypatch.setenv("SKIPCAT_CACHE", str(cache))
    return open_library(build_library(90))


def test_the_library_answers_without_a_gpu(library: ctypes.CDLL) -> None:
    problem = Problem(rows=1, n=4096, m=4096, rank=1536)
    device = Device(multiprocessors=132, capability=90)
    assert library.skipcatWhyRefused(ctypes.byref(problem)) is None
    # z [1, 1536] in half precision, and sums of at least one slice in float32.
    needed = library.skipcatWorkspaceBytes(ctypes.byref(problem), ctypes.byref(device))
    assert 2 * 1536 + 4 * 4096 <= needed < 4 << 20
    problem.rank = 5000
    assert b"rank" in library.skipcatWhyRefused(ctypes.byref(problem))


def test_what_a_search_may_choose_the_library_computes(library: ctypes.CDLL) -> None:
    kinds = [(0, 0)]
    for format_ in {f for runtime in RUNTIMES.values() for f in runtime.formats}:
        for columns in (96, 1000):
            kinds.append((kernel_bits(format_.bits), kernel_block(format_, columns)))
    for (a, a_block), (b, b_block) in itertools.product(kinds, kinds):
        for rank in (384, 1000):  # of full rank there is no a
            problem = Problem(
                rows=1, n=1000, m=77, rank=rank, indexed=True,
                a_weights=a, a_group=a_block, b_weights=b, b_group=b_block,
            )  # fmt: skip
            assert library.skipcatWhyRefused(ctypes.byref(problem)) is None
    problem.b_weights, problem.b_group = 4, 24
    assert library.skipcatWhyRefused(ctypes.byref(problem)) is not None


def test_a_machine_that_gives_no_memory_is_said_plainly(library: ctypes.CDLL) -> None:
    with pytest.raises(ResourceError, match="no memory") as raised:
        _make_counters(library, 99, 256)
    assert raised.value.exit_status == 4
    assert "cuda:99" in str(raised.value)
    assert "CUDA error" in str(raised.value)


def test_a_second_call_compiles_nothing(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_compile_library", lambda *_: pytest.fail("compiled again"))
    assert build_library(90).is_file()


def test_the_name_tells_gpu_and_compiler_apart() -> None:
    names = {_library_name(capability, version) for capability in (87, 90) for version in "ab"}
    assert len(names) == 4


def test_no_compiler_is_said_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "local_nvcc", lambda: None)
    with pytest.raises(InputError, match="no CUDA compiler"):
        build_library(90)


def test_an_old_gpu_is_refused() -> None:
    with pytest.raises(InputError, match="Ampere"):
        build_library(75)


def test_a_failing_compiler_leaves_nothing(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'error: no such thing' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    folder = tmp_path / "out"
    folder.mkdir()
    with pytest.raises(InputError, match="cannot compile") as raised:
        _compile_library(nvcc, 90, folder / "library.so")
    assert "no such thing" in str(raised.value)
    assert list(folder.iterdir()) == []


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "library.so"
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match="does not load"):
        open_library(path)
