"""What this machine can do: facts about it, and for each stage of the pipeline yes or no, and why.

`look` gathers the facts; `stages` and `plugin_route` judge them and touch nothing, so that a test
can ask about a machine it does not have. Versions come from package metadata: importing torch or
TensorRT to ask for a number would take seconds.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.engine.plugin_library import BUILT_PLUGIN
from trt_plugins.block_skip.aot import OLDEST_TENSORRT as FIRST_EMBEDDING_TENSORRT

GIBIBYTE = 1 << 30
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
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
RTX_TARGETS = ", ".join("SM" + capability.replace(".", "") for capability in RTX_CAPABILITIES)
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


@dataclass(frozen=True)
class Verdict:
    """Whether one stage of the pipeline works here, and why."""

    stage: str
    works: bool
    why: str


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


def release(version: str | None) -> tuple[int, ...]:
    """The first two numbers of a version, for comparing; () for none."""
    return tuple(int(part) for part in re.findall(r"\d+", version or "")[:2])


def plugin_route(version: str | None) -> str:
    """What a BlockSkipLinear node becomes in a standard TensorRT of this version."""
    if version is None:
        return "function body: no TensorRT to load the plugin into"
    if release(version) < (10, 0):
        return f"function body: TensorRT {version} has no IPluginV3"
    if release(version) < (10, 7):
        return (
            f"TensorRT {version} prefers the function body; the plugin is taken from a file "
            "whose functions are stripped"
        )
    if release(version) < (10, 15):
        return f"plugin, whenever it is registered (TensorRT {version}); else function body"
    return (
        f"plugin, if registered under the node's plugin_namespace (TensorRT {version}); "
        "else function body, silently"
    )


def stages(machine: Machine) -> list[Verdict]:
    """Each stage of the pipeline: does it work on this machine, and why."""
    return [
        needs("compress", machine, ("torch", "transformers"), "needs no GPU"),
        needs("recover", machine, ("torch", "transformers", "peft"), "needs no GPU"),
        needs("export", machine, ("torch", "transformers", "onnx", "onnxscript"), "needs no GPU"),
        judge_onnx_cpu(machine),
        needs("genai", machine, ("onnxruntime-genai",), "runs the export by its genai_config.json"),
        needs("engine, RTX", machine, ("tensorrt-rtx",), f"no GPU needed; targets {RTX_TARGETS}"),
        judge_standard_engine(machine),
        judge_run_engine(machine),
        judge_plugin(machine),
    ]


EXTRA_OF = {
    "onnxruntime": "cpu",
    "onnxruntime-genai": "cpu",
    "tensorrt": "trt",
    "tensorrt-rtx": "rtx",
    "peft": "recover",
}


def needs(stage: str, machine: Machine, names: Iterable[str], note: str) -> Verdict:
    """A stage that works wherever its packages are installed."""
    names = tuple(names)
    missing = [name for name in names if name not in machine.versions]
    if not missing:
        found = ", ".join(f"{name} {machine.versions[name]}" for name in names)
        return Verdict(stage, True, f"{found}; {note}")
    extras = ",".join(sorted({EXTRA_OF[name] for name in missing if name in EXTRA_OF}))
    cure = f"make setup EXTRAS={extras}" if extras else "make setup"
    return Verdict(stage, False, f"not installed: {', '.join(missing)} ({cure})")


def judge_onnx_cpu(machine: Machine) -> Verdict:
    """ONNX Runtime on the CPU, and which export profile it understands."""
    version = machine.versions.get("onnxruntime")
    if version is not None and release(version) < (1, 25):
        why = f"onnxruntime {version}: the compat profile only; TensorScatter came with 1.25"
        return Verdict("run, ONNX on CPU", True, why)
    note = f"profiles opset24 and compat; {machine.cores} cores"
    return needs("run, ONNX on CPU", machine, ("onnxruntime",), note)


def judge_standard_engine(machine: Machine) -> Verdict:
    """Building with the standard TensorRT, which times its kernels on the GPU."""
    stage = "engine, standard TensorRT"
    if not machine.gpus and machine.jetpack is None:
        return Verdict(stage, False, f"needs a GPU to build: {machine.reasons.get('GPU', 'none')}")
    version = machine.versions.get("tensorrt")
    if version is not None and release(version) < (10, 15):
        profile = "compat profile only; the opset24 operators came with 10.15"
    else:
        profile = "profiles opset24 and compat"
    if version is None and machine.jetpack is not None:
        why = "JetPack's TensorRT is not visible here: .venv needs --system-site-packages"
        return Verdict(stage, False, why)
    return needs(stage, machine, ("tensorrt",), profile)


def judge_run_engine(machine: Machine) -> Verdict:
    """Running an engine: a GPU, and a TensorRT that serves it."""
    stage = "run, engine"
    if not machine.gpus and machine.jetpack is None:
        why = f"needs a GPU: {machine.reasons.get('GPU', 'none found')}"
        return Verdict(stage, False, f"{why}; run uses ONNX Runtime on the CPU instead")
    if "tensorrt" in machine.versions:
        return Verdict(stage, True, f"standard TensorRT {machine.versions['tensorrt']}")
    served = [gpu for gpu in machine.gpus if gpu.capability in RTX_CAPABILITIES]
    if "tensorrt-rtx" in machine.versions and served:
        version = machine.versions["tensorrt-rtx"]
        return Verdict(stage, True, f"TensorRT for RTX {version} on {served[0].name}")
    if not machine.gpus:
        return Verdict(stage, False, "JetPack's TensorRT is not visible to this Python")
    capabilities = ", ".join(gpu.capability for gpu in machine.gpus)
    why = f"compute capability {capabilities} needs the standard TensorRT (make setup EXTRAS=trt)"
    return Verdict(stage, False, why)


def judge_plugin(machine: Machine) -> Verdict:
    """Whether BlockSkipLinear runs as the plugin or as its function body."""
    stage = "block-skip plugin"
    version = machine.versions.get("tensorrt")
    has_gpu = bool(machine.gpus) or machine.jetpack is not None
    if version is None and "tensorrt-rtx" in machine.versions:
        return Verdict(stage, False, "function body: TensorRT for RTX takes no plugins on Linux")
    route = plugin_route(version)
    if version is None or not has_gpu or release(version) < (10, 0):
        return Verdict(stage, False, route)
    embeds = release(version) >= FIRST_EMBEDDING_TENSORRT
    embedding = "; or no library, with engine --embed-kernels" if embeds else ""
    if machine.plugin is None:
        compiler = machine.nvcc or "nvcc from PyPI"
        how = f"not built: make plugin (with {compiler}); then: {route}{embedding}"
        return Verdict(stage, False, how)
    return Verdict(stage, True, f"{machine.plugin}; {route}{embedding}")


def facts(machine: Machine) -> list[tuple[str, str, str]]:
    """Rows of name, value and reason, in the order to print them."""
    meanings = "; ".join(dict.fromkeys(CPU_FLAGS[flag] for flag in machine.cpu_flags))
    rows = [
        ("Python", machine.python, machine.system),
        (
            "CPU",
            f"{machine.cores} cores: {' '.join(machine.cpu_flags) or 'flags unknown'}",
            meanings,
        ),
        (
            "RAM",
            f"{machine.ram_free_bytes / GIBIBYTE:.1f} GiB free",
            f"of {machine.ram_bytes / GIBIBYTE:.1f} GiB",
        ),
        ("Disk", f"{machine.disk_free_bytes / GIBIBYTE:.1f} GiB free", "where this was started"),
    ]
    for gpu in machine.gpus:
        memory = f"{gpu.memory_mib} MiB" if gpu.memory_mib else "memory shared with the CPU"
        value = f"{gpu.name}, {memory}, compute capability {gpu.capability}"
        rows.append(("GPU", value, f"nvidia-smi, driver {gpu.driver}"))
    if not machine.gpus:
        rows.append(("GPU", "none", machine.reasons.get("GPU", "")))
    rows.append(("JetPack", machine.jetpack or "no", machine.reasons.get("JetPack", "")))
    rows.append(("nvcc", machine.nvcc or "no", machine.reasons.get("nvcc", "")))
    for name in DISTRIBUTIONS:
        rows.append((name, machine.versions.get(name, "no"), version_note(name, machine)))
    return rows


def version_note(name: str, machine: Machine) -> str:
    """What is worth knowing beside a library's version."""
    if name not in machine.versions:
        return "not installed"
    if name == "onnxruntime":
        return ", ".join(machine.providers) or machine.reasons.get("providers", "")
    if name == "torch" and machine.versions[name].endswith("+cpu"):
        return "built without CUDA"
    return "package metadata"


def as_json(machine: Machine) -> dict[str, Any]:
    """The whole report, for --json."""
    return {
        "schema": 1,
        "facts": [
            {"name": name, "value": value, "reason": reason}
            for name, value, reason in facts(machine)
        ],
        "stages": [
            {"stage": verdict.stage, "works": verdict.works, "why": verdict.why}
            for verdict in stages(machine)
        ],
    }
