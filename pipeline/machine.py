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
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.engine.plugin_library import BUILT_PLUGIN

TEGRA_RELEASE = Path("/etc/nv_tegra_release")
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
# L4T release to JetPack and the TensorRT it ships.
JETPACKS = {
    (36, 3): "JetPack 6.0, TensorRT 8.6",
    (36, 4): "JetPack 6.1 or 6.2, TensorRT 10.3",
    (38, 2): "JetPack 7.0 (Thor only), TensorRT 10.13",
    (38, 4): "JetPack 7.1 (Thor only), TensorRT 10.13",
    (39, 2): "JetPack 7.2, TensorRT 10.16",
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


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU, as nvidia-smi describes it."""

    name: str
    capability: str
    memory_mib: int | None
    driver: str


@dataclass(frozen=True)
class Machine:
    """What was found; `reasons` says for each absent or derived thing where that was read."""

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
    providers, provider_reason = onnxruntime_providers()
    jetpack = read_jetpack()
    nvcc = find_nvcc()
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
        plugin=str(BUILT_PLUGIN) if BUILT_PLUGIN.is_file() else None,
        versions=installed_versions(),
        providers=providers,
        reasons={
            "GPU": gpu_reason,
            "JetPack": str(TEGRA_RELEASE) + (" says so" if jetpack else " does not exist"),
            "nvcc": "nvcc --version" if nvcc else "not on PATH, nor in /usr/local/cuda/bin",
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


def run_program(command: list[str]) -> tuple[int, str]:
    """Exit status and output of a short program; status 127 when it cannot be run."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 127, str(error)
    return answer.returncode, (answer.stdout or answer.stderr).strip()


def find_gpus() -> tuple[tuple[Gpu, ...], str]:
    """NVIDIA GPUs by nvidia-smi, and what was seen if there are none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return (), "nvidia-smi is not installed"
    query = "--query-gpu=name,compute_cap,memory.total,driver_version"
    status, output = run_program([program, query, "--format=csv,noheader,nounits"])
    if status != 0:
        return (), f"nvidia-smi fails: {output.splitlines()[0] if output else f'status {status}'}"
    gpus = parse_gpus(output)
    return gpus, "nvidia-smi" if gpus else "nvidia-smi lists none"


def parse_gpus(csv: str) -> tuple[Gpu, ...]:
    """GPUs of nvidia-smi's CSV; a Jetson prints [N/A] for memory it shares with the CPU."""
    gpus = []
    for line in csv.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 4:
            name, capability, memory, driver = cells
            gpus.append(Gpu(name, capability, int(memory) if memory.isdigit() else None, driver))
    return tuple(gpus)


def read_jetpack(path: Path = TEGRA_RELEASE) -> str | None:
    """The JetPack of this Jetson, from its L4T release; None elsewhere."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    match = re.search(r"R(\d+) \(release\), REVISION: (\d+)(?:\.(\d+))?", text)
    if match is None:
        return f"unknown release: {text.strip().splitlines()[0] if text.strip() else 'empty file'}"
    major, minor = int(match.group(1)), int(match.group(2))
    known = JETPACKS.get((major, minor), "JetPack not known to this version of skipcat")
    return f"L4T {major}.{minor}{'.' + match.group(3) if match.group(3) else ''}: {known}"


def find_nvcc() -> str | None:
    """Version of the CUDA compiler; JetPack leaves it off PATH."""
    program = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if program is None:
        return None
    match = re.search(r"release (\d+\.\d+)", run_program([program, "--version"])[1])
    return f"{match.group(1)} ({program})" if match else None


def installed_versions() -> dict[str, str]:
    """Versions of the libraries the stages need, by the names of DISTRIBUTIONS."""
    versions = {}
    for name, distributions in DISTRIBUTIONS.items():
        found = next(filter(None, map(version_of, distributions)), None)
        if found is not None:
            versions[name] = found
    return versions


def version_of(distribution: str) -> str | None:
    """Installed version of one distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def onnxruntime_providers() -> tuple[tuple[str, ...], str]:
    """Execution providers ONNX Runtime was built with, and how that is known."""
    try:
        import onnxruntime
    except ImportError as error:
        return (), f"import onnxruntime: {error}"
    return tuple(onnxruntime.get_available_providers()), "built into the installed package"
