"""What this machine is: its processor, memory, disk, GPUs, and the libraries installed.

Versions come from package metadata: importing torch or TensorRT to ask for a number would take
seconds.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import InputError
from pipeline.gpu import TEGRA_RELEASE, Gpu, find_gpus, read_jetpack
from pipeline.toolchain import local_nvcc, nvcc_release

CPU_FLAGS = {
    "avx2": "fp32 and int8 kernels",
    "avx512f": "wide fp32 kernels",
    "avx512_vnni": "int8 dot products: quick MatMulNBits",
    "avx_vnni": "int8 dot products: quick MatMulNBits",
    "amx_int8": "int8 matrix tiles",
    "asimd": "fp32 kernels",
    "asimddp": "int8 dot products: quick MatMulNBits",
    "i8mm": "int8 matrix products",
}
# One module may come from several distributions; the first one installed counts.
DISTRIBUTIONS = {
    "torch": ("torch",),
    "transformers": ("transformers",),
    "onnx": ("onnx",),
    "onnxscript": ("onnxscript",),
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
    "onnxruntime-genai": ("onnxruntime-genai-cuda", "onnxruntime-genai"),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt-rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
    "polygraphy": ("polygraphy",),
    "peft": ("peft",),
}
_NO_NVCC = "not in CUDA_HOME, on PATH, or in /usr/local/cuda/bin"


@dataclass(frozen=True)
class Machine:
    """What was found.

    `reasons` says for each absent or derived thing where that was read; `plugin` is for who knows
    where the plugin library lies.
    """

    python: str
    system: str
    cores: int
    cpu_flags: tuple[str, ...]
    ram_bytes: int
    ram_free_bytes: int
    disk_free_bytes: int
    gpus: tuple[Gpu, ...] = ()
    jetpack: str | None = None
    nvcc: str | None = None
    plugin: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    providers: tuple[str, ...] = ()
    reasons: dict[str, str] = field(default_factory=dict)


def look(folder: Path | None = None) -> Machine:
    """Examine this machine; `folder` is where artefacts would be written (default: here)."""
    import psutil

    memory = psutil.virtual_memory()
    gpus, gpu_reason = find_gpus()
    providers, provider_reason = _onnxruntime_providers()
    jetpack = read_jetpack()
    nvcc = _find_nvcc()
    return Machine(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cores=usable_cores(),
        cpu_flags=cpu_flags(),
        ram_bytes=memory.total,
        ram_free_bytes=memory.available,
        disk_free_bytes=shutil.disk_usage(folder or Path.cwd()).free,
        gpus=gpus,
        jetpack=jetpack,
        nvcc=nvcc,
        versions=_installed_versions(),
        providers=providers,
        reasons={
            "GPU": gpu_reason,
            "JetPack": str(TEGRA_RELEASE) + (" says so" if jetpack else " does not exist"),
            "nvcc": "nvcc --version" if nvcc else _NO_NVCC,
            "providers": provider_reason,
        },
    )


def usable_cores() -> int:
    """Cores this process may run on, which in a container can be fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """Those of CPU_FLAGS that this processor has; empty where /proc does not tell."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ()
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    present = set(line.group(1).split()) if line else set()
    return tuple(flag for flag in CPU_FLAGS if flag in present)


def _find_nvcc() -> str | None:
    """Version and place of the CUDA compiler."""
    path = local_nvcc()
    try:
        return f"{nvcc_release(path)} ({path})" if path else None
    except InputError:
        return None


def _installed_versions() -> dict[str, str]:
    """Versions of the libraries the stages need, by the names of DISTRIBUTIONS."""
    versions = {}
    for name, distributions in DISTRIBUTIONS.items():
        found = next(filter(None, map(_version_of, distributions)), None)
        if found is not None:
            versions[name] = found
    return versions


def _version_of(distribution: str) -> str | None:
    """Installed version of one distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _onnxruntime_providers() -> tuple[tuple[str, ...], str]:
    """Execution providers ONNX Runtime was built with, and how that is known."""
    try:
        import onnxruntime
    except ImportError as error:
        return (), f"import onnxruntime: {error}"
    return tuple(onnxruntime.get_available_providers()), "built into the installed package"
