"""Programs out of the kernels, by a host compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.kernels.build import BLOCK_SKIP, KernelSources
from trt_plugins.toolchain import local_nvcc

KERNELS = Path(__file__).parents[2] / "trt_plugins" / "block_skip"
LATENT_KERNELS = KERNELS.with_name("latent_attention")
FAST = ("-O1",)
CHECKED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


def cuda_headers() -> Path:
    """The folder with cuda_fp16.h; skip the test where there is none."""
    nvcc = local_nvcc()
    roots = [nvcc.resolve().parents[1]] if nvcc else []
    for root in (*roots, *Path("/usr/local").glob("cuda*")):
        if (root / "include" / "cuda_fp16.h").is_file():
            return root / "include"
    pytest.skip("no CUDA headers: nvcc is not installed")


def compile_program(
    folder: Path, sources: tuple[str, ...], flags: tuple[str, ...], defines: tuple[str, ...] = (),
    kernels: Path = KERNELS,
) -> Path:  # fmt: skip
    """Build a program out of files of a plugin's folder, every file on its own core."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    common = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-clobbered"]
    common += [*flags, *defines, "-DSKIPCAT_EMULATE", f"-I{kernels}", f"-I{KERNELS}"]
    common += ["-isystem", str(cuda_headers())]
    objects = [folder / f"{place}.o" for place in range(len(sources))]
    running = [
        subprocess.Popen([*common, "-x", "c++", "-c", str(kernels / source), "-o", str(target)])
        for source, target in zip(sources, objects, strict=True)
    ]
    assert [process.wait() for process in running] == [0] * len(sources)
    program = folder / "program"
    subprocess.run([*common, *map(str, objects), "-o", str(program)], check=True)
    return program


def compile_library(folder: Path, of: KernelSources = BLOCK_SKIP) -> Path:
    """A kernel library for ctypes, over the emulation."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    headers, library = cuda_headers(), folder / "emulated.so"
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-w", "-DSKIPCAT_EMULATE"]
    command += [f"-I{place}" for place in of.folders]
    command += ["-isystem", str(headers), "-x", "c++"]
    command += [str(of.find(name)) for name in of.sources]
    lib = next((p for p in (headers.parent / "lib64", headers.parent / "lib") if p.is_dir()), None)
    command += ["-x", "none", *([f"-L{lib}"] if lib else []), "-lcudart_static"]
    subprocess.run([*command, "-ldl", "-lrt", "-lpthread", "-o", str(library)], check=True)
    return library


def compare(program: Path, cases: int, seed: int) -> subprocess.CompletedProcess[str]:
    """Run `cases` random problems; fibers and problems are shuffled by `seed`."""
    environment = os.environ | {
        "SKIPCAT_EMULATE_SEED": str(seed),
        "ASAN_OPTIONS": "detect_stack_use_after_return=0",
    }
    command = [str(program), str(cases), str(seed)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
