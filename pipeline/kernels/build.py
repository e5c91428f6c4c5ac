"""A kernel library for one GPU: compiled by nvcc when it is first needed, and kept.

It lies in the user's cache, under a name made of everything it depends on, so that a new version of
the sources, of nvcc, or another GPU gets a library of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class KernelSources:
    """What one library is compiled of.

    Attributes:
        name: how its file begins.
        folders: in which its files are looked for, in this order; all hold headers.
        sources: what is compiled, file names.
        headers: what those include.
    """

    name: str
    folders: tuple[Path, ...]
    sources: tuple[str, ...]
    headers: tuple[str, ...]

    def find(self, name: str) -> Path:
        """The path of a source or header."""
        return next(folder / name for folder in self.folders if (folder / name).is_file())

    @property
    def title(self) -> str:
        """As a message calls its kernels."""
        return self.name.replace("_", "-")


BLOCK_SKIP = KernelSources("block_skip", (SOURCE_FOLDER,), SOURCES, _HEADERS)
LATENT_ATTENTION = KernelSources(
    "latent_attention",
    (SOURCE_FOLDER.with_name("latent_attention"), SOURCE_FOLDER),
    ("latent_attention_kernel.cu", "latent_c_interface.cpp"),
    (
        "attend.cuh", "blocks.cuh", "device.cuh", "lanes.cuh", "latent_attention.h", "rebuild.cuh",
        "stage.cuh", "walk_attend.cuh", "walk_copies.cuh", "walk_fragments.cuh", "walk_join.cuh",
        "walk_keys.cuh", "walk_launch.cuh", "walk_layout.cuh", "walk_values.cuh",
    ),
)  # fmt: skip


def _library_name(capability: int, version: str, kernels: KernelSources = BLOCK_SKIP) -> str:
    """A file name that differs whenever the compiled library would."""
    digest = hashlib.sha256(version.encode())
    for name in (*kernels.sources, *kernels.headers):
        digest.update(name.encode() + kernels.find(name).read_bytes())
    return f"{kernels.name}-sm{capability}-{digest.hexdigest()[:16]}.so"


def build_library(capability: int, kernels: KernelSources = BLOCK_SKIP) -> Path:
    """A kernel library for GPUs of `capability` (87 is 8.7), compiled unless it is there.

    Raises:
        InputError: the GPU is too old, there is no nvcc, or it fails; the message has its output.
    """
    require_capability(capability)
    nvcc = local_nvcc()
    if nvcc is None:
        raise InputError(
            f"The {kernels.title} kernels must be compiled, and there is no CUDA compiler.",
            observed="no nvcc in CUDA_HOME, on PATH, or in /usr/local/cuda/bin",
            change="install the CUDA toolkit (on a Jetson: apt install cuda-nvcc-12-6)",
        )
    folder = cache_folder() / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    version = nvcc_text(nvcc).rpartition("\n")[2]
    target = folder / _library_name(capability, version, kernels)
    make_once(
        target,
        f"compiling the {kernels.title} kernels for sm_{capability}, once",
        lambda: _compile_library(nvcc, capability, target, kernels),
    )
    return target


def make_once(target: Path, message: str, make: Callable[[], None]) -> None:
    """Make a file that is not there, saying so: one of two processes that start together does."""
    with FileLock(f"{target}.lock"):
        if not target.is_file():
            note(f"{message}: {target}")
            make()


def _compile_library(
    nvcc: Path, capability: int, target: Path, kernels: KernelSources = BLOCK_SKIP
) -> None:
    """Run nvcc; `target` appears only when it succeeded.

    Raises:
        InputError: it fails, with the end of what it printed.
    """
    aside = target.with_suffix(".partial")  # one process at a time is here
    arguments = [
        "-shared", "-cudart", "static",
        "-gencode", f"arch=compute_{capability},code=sm_{capability}",
        "-Xcompiler", "-fPIC,-fvisibility=hidden",
        *(f"-I{folder}" for folder in kernels.folders),
        *(str(kernels.find(name)) for name in kernels.sources), "-o", str(aside),
    ]  # fmt: skip
    try:
        run_nvcc(nvcc, arguments, f"the {kernels.title} kernels")
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
