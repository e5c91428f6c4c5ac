"""The CUDA kernels themselves, compiled for the CPU and run there thread by thread."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[3] / "trt_plugins" / "block_skip"
SOURCES = (KERNELS / "block_skip_kernel.cu", KERNELS / "emulate" / "compare.cpp")
FAST = ("-O1",)
CHECKED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


def cuda_headers() -> Path:
    """The folder with cuda_fp16.h; skip the test where there is none."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    roots = [Path(nvcc).resolve().parents[1]] if nvcc else []
    for root in (*roots, *Path("/usr/local").glob("cuda*")):
        if (root / "include" / "cuda_fp16.h").is_file():
            return root / "include"
    pytest.skip("no CUDA headers: nvcc is not installed")


def compile_comparison(folder: Path, flags: tuple[str, ...], defines: tuple[str, ...] = ()) -> Path:
    """Build `compare` into `folder`, every file on its own core."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    common = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-clobbered"]
    common += [
        *flags,
        *defines,
        "-DSKIPCAT_EMULATE",
        f"-I{KERNELS}",
        "-isystem",
        str(cuda_headers()),
    ]
    objects = [folder / (source.stem + ".o") for source in SOURCES]
    running = [
        subprocess.Popen([*common, "-x", "c++", "-c", str(source), "-o", str(target)])
        for source, target in zip(SOURCES, objects, strict=True)
    ]
    assert [process.wait() for process in running] == [0, 0]
    program = folder / "compare"
    subprocess.run([*common, *map(str, objects), "-o", str(program)], check=True)
    return program


def compare(program: Path, cases: int, seed: int) -> subprocess.CompletedProcess[str]:
    """Run `cases` random problems; fibers and problems are shuffled by `seed`."""
    environment = os.environ | {
        "SKIPCAT_EMULATE_SEED": str(seed),
        "ASAN_OPTIONS": "detect_stack_use_after_return=0",
    }
    command = [str(program), str(cases), str(seed)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_comparison(tmp_path_factory.mktemp("emulated"), FAST)


def test_every_shape_type_and_width_agrees_with_double_precision(program: Path) -> None:
    seed = int.from_bytes(os.urandom(2), "little")
    result = compare(program, 100, seed)
    assert result.returncode == 0, f"seed {seed}\n{result.stdout}{result.stderr}"
    assert "100 cases, 0 beyond" in result.stdout


def test_a_missing_barrier_is_seen(tmp_path: Path) -> None:
    # The comparison would be worth little if a broken kernel passed it.
    broken = compile_comparison(tmp_path, FAST, ("-DSKIPCAT_EMULATE_NO_BARRIER",))
    assert compare(broken, 20, 1).returncode != 0


@pytest.mark.slow
def test_no_kernel_reads_or_writes_beside_its_memory(tmp_path: Path) -> None:
    result = compare(compile_comparison(tmp_path, CHECKED), 150, 3)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ERROR" not in result.stderr
