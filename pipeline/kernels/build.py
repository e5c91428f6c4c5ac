"""The kernel library for one GPU: compiled by nvcc when it is first needed, and kept.

It lies in the user's cache, under a name made of everything it depends on, so that a new version of
the sources, of nvcc, or another GPU gets a library of its own.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from filelock import FileLock

from pipeline.errors import InputError
from pipeline.progress import note
from pipeline.remembered import cache_folder
from trt_plugins.toolchain import local_nvcc, nvcc_text, require_capability, run_nvcc

SOURCE_FOLDER = Path(__file__).parents[2] / "trt_plugins" / "block_skip"
SOURCES = ("block_skip_kernel.cu", "c_interface.cpp")
_HEADERS = (
    "block_skip.h", "cut.cuh", "decode.cuh", "device.cuh", "feed.cuh", "prefill.cuh",
    "prefill_weights.cuh", "stream.cuh", "sums.cuh", "weights.cuh",
)  # fmt: skip


def _library_name(capability: int, version: str) -> str:
    """A file name that differs whenever the compiled library would."""
    digest = hashlib.sha256(version.encode())
    for name in (*SOURCES, *_HEADERS):
        digest.update(name.encode() + (SOURCE_FOLDER / name).read_bytes())
    return f"block_skip-sm{capability}-{digest.hexdigest()[:16]}.so"


def build_library(capability: int) -> Path:
    """The kernel library for GPUs of `capability` (87 is 8.7), compiled unless it is there.

    Raises:
        InputError: the GPU is too old, there is no nvcc, or it fails; the message has its output.
    """
    require_capability(capability)
    nvcc = local_nvcc()
    if nvcc is None:
        raise InputError(
            "The block-skip kernels must be compiled, and there is no CUDA compiler.",
            observed="no nvcc in CUDA_HOME, on PATH, or in /usr/local/cuda/bin",
            change="install the CUDA toolkit (on a Jetson: apt install cuda-nvcc-12-6)",
        )
    folder = cache_folder() / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / _library_name(capability, nvcc_text(nvcc).rpartition("\n")[2])
    # Two processes that start together compile once.
    with FileLock(f"{target}.lock"):
        if not target.is_file():
            note(f"compiling the block-skip kernels for sm_{capability}, once: {target}")
            _compile_library(nvcc, capability, target)
    return target


def _compile_library(nvcc: Path, capability: int, target: Path) -> None:
    """Run nvcc; `target` appears only when it succeeded.

    Raises:
        InputError: it fails, with the end of what it printed.
    """
    aside = target.with_suffix(".partial")  # one process at a time is here
    arguments = [
        "-shared", "-cudart", "static",
        "-gencode", f"arch=compute_{capability},code=sm_{capability}",
        "-Xcompiler", "-fPIC,-fvisibility=hidden",
        *(str(SOURCE_FOLDER / name) for name in SOURCES), "-o", str(aside),
    ]  # fmt: skip
    try:
        run_nvcc(nvcc, arguments, "the block-skip kernels")
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
