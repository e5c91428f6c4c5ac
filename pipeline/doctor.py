"""For each stage of the pipeline: does it work on this machine, and why.

Everything but `examine` judges what was found and touches nothing, so that a test can ask about a
machine it does not have. Versions come from package metadata: importing torch or TensorRT to ask
for a number would take seconds.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.engine.plan import BUILT_PLUGIN
from pipeline.errors import InputError
from pipeline.export.contract import COMPAT, COMPAT_STATIC, OPSET24, PROFILES, dotted
from pipeline.gpu import (
    RTX_CAPABILITIES,
    TEGRA_RELEASE,
    Gpu,
    capability_name,
    find_gpus,
    read_jetpack,
)
from pipeline.kernels.cpu_library import why_no_kernels
from pipeline.machine import CPU_FLAGS, cpu_flags, usable_cores
from trt_plugins.block_skip.aot import OLDEST_TENSORRT as _FIRST_EMBEDDING_TENSORRT
from trt_plugins.toolchain import local_nvcc, nvcc_release

_GIBIBYTE = 1 << 30
# One module may come from several distributions; the first one installed counts.
_DISTRIBUTIONS = {
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
_RTX_TARGETS = ", ".join(map(capability_name, RTX_CAPABILITIES)).upper()


@dataclass(frozen=True)
class _StageVerdict:
    """Whether one stage of the pipeline works here, and why."""

    stage: str
    works: bool
    why: str


@dataclass(frozen=True)
class Machine:
    """What was found of this machine, and what that means for each stage of the pipeline.

    `reasons` says for each absent or derived thing where that was read; `plugin` is the library
    that `make plugin` built, if it did, and `no_cpu_kernels` why the kernels for the CPU cannot be.
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
    no_cpu_kernels: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    providers: tuple[str, ...] = ()
    reasons: dict[str, str] = field(default_factory=dict)

    def facts(self) -> list[tuple[str, str, str]]:
        """Rows of name, value and reason, in the order to print them."""
        meanings = "; ".join(dict.fromkeys(CPU_FLAGS[flag] for flag in self.cpu_flags))
        rows = [
            ("Python", self.python, self.system),
            (
                "CPU",
                f"{self.cores} cores: {' '.join(self.cpu_flags) or 'flags unknown'}",
                meanings,
            ),
            (
                "RAM",
                f"{self.ram_free_bytes / _GIBIBYTE:.1f} GiB free",
                f"of {self.ram_bytes / _GIBIBYTE:.1f} GiB",
            ),
            ("Disk", f"{self.disk_free_bytes / _GIBIBYTE:.1f} GiB free", "where this was started"),
        ]
        for gpu in self.gpus:
            memory = f"{gpu.memory_mib} MiB" if gpu.memory_mib else "memory shared with the CPU"
            value = f"{gpu.name}, {memory}, compute capability {gpu.dotted_capability}"
            rows.append(("GPU", value, f"nvidia-smi, driver {gpu.driver}"))
        if not self.gpus:
            rows.append(("GPU", "none", self.reasons.get("GPU", "")))
        rows.append(("JetPack", self.jetpack or "no", self.reasons.get("JetPack", "")))
        rows.append(("nvcc", self.nvcc or "no", self.reasons.get("nvcc", "")))
        for name in _DISTRIBUTIONS:
            rows.append((name, self.versions.get(name, "no"), _version_note(name, self)))
        return rows

    def stages(self) -> list[_StageVerdict]:
        """Each stage of the pipeline: does it work on this machine, and why."""
        return [
            _needs("train", self, ("torch", "transformers"), "the driving network; needs no GPU"),
            _needs("compress", self, ("torch", "transformers"), "needs no GPU"),
            _needs("recover", self, ("torch", "transformers", "peft"), "needs no GPU"),
            _needs("export", self, ("torch", "transformers", "onnx", "onnxscript"), "needs no GPU"),
            _judge_onnx_cpu(self),
            _needs(
                "genai", self, ("onnxruntime-genai",), "runs the export by its genai_config.json"
            ),
            _needs(
                "engine, RTX", self, ("tensorrt-rtx",), f"no GPU needed; targets {_RTX_TARGETS}"
            ),
            _judge_standard_engine(self),
            _judge_run_engine(self),
            _judge_plugin(self),
            _judge_cpu_kernels(self),
        ]

    def to_json(self) -> dict[str, Any]:
        """The whole report, for --json."""
        return {
            "schema": 1,
            "facts": [
                {"name": name, "value": value, "reason": reason}
                for name, value, reason in self.facts()
            ],
            "stages": [
                {"stage": verdict.stage, "works": verdict.works, "why": verdict.why}
                for verdict in self.stages()
            ],
        }


def examine() -> Machine:
    """What this machine has; artefacts would be written here."""
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
        disk_free_bytes=shutil.disk_usage(Path.cwd()).free,
        gpus=gpus,
        jetpack=jetpack,
        nvcc=nvcc,
        plugin=str(BUILT_PLUGIN) if BUILT_PLUGIN.is_file() else None,
        no_cpu_kernels=why_no_kernels(),
        versions=_installed_versions(),
        providers=providers,
        reasons={
            "GPU": gpu_reason,
            "JetPack": str(TEGRA_RELEASE) + (" says so" if jetpack else " does not exist"),
            "nvcc": "nvcc --version" if nvcc else _NO_NVCC,
            "providers": provider_reason,
        },
    )


def _release(version: str | None) -> tuple[int, ...]:
    """The first two numbers of a version, for comparing; () for none."""
    return tuple(int(part) for part in re.findall(r"\d+", version or "")[:2])


def _plugin_route(version: str | None) -> str:
    """What a BlockSkipLinear node becomes in a standard TensorRT of this version."""
    if version is None:
        return "function body: no TensorRT to load the plugin into"
    if _release(version) < (10, 0):
        return f"function body: TensorRT {version} has no IPluginV3"
    if _release(version) < (10, 7):
        return (
            f"TensorRT {version} prefers the function body; the plugin is taken from a file "
            "whose functions are stripped"
        )
    if _release(version) < (10, 15):
        return f"plugin, whenever it is registered (TensorRT {version}); else function body"
    return (
        f"plugin, if registered under the node's plugin_namespace (TensorRT {version}); "
        "else function body, silently"
    )


_EXTRA_OF = {
    "onnxruntime": "cpu",
    "onnxruntime-genai": "cpu",
    "tensorrt": "trt",
    "tensorrt-rtx": "rtx",
    "peft": "recover",
}


def _needs(stage: str, machine: Machine, names: Iterable[str], note: str) -> _StageVerdict:
    """A stage that works wherever its packages are installed."""
    names = tuple(names)
    missing = [name for name in names if name not in machine.versions]
    if not missing:
        found = ", ".join(f"{name} {machine.versions[name]}" for name in names)
        return _StageVerdict(stage, True, f"{found}; {note}")
    extras = ",".join(sorted({_EXTRA_OF[name] for name in missing if name in _EXTRA_OF}))
    cure = f"make setup EXTRAS={extras}" if extras else "make setup"
    return _StageVerdict(stage, False, f"not installed: {', '.join(missing)} ({cure})")


def _judge_onnx_cpu(machine: Machine) -> _StageVerdict:
    """ONNX Runtime on the CPU, and which export profile it understands."""
    version = machine.versions.get("onnxruntime")
    oldest = PROFILES[OPSET24].oldest_onnxruntime
    if version is not None and _release(version) < oldest:
        came = f"TensorScatter came with {dotted(oldest)}"
        why = f"onnxruntime {version}: the {COMPAT} profile only; {came}"
        return _StageVerdict("run, ONNX on CPU", True, why)
    note = f"profiles {OPSET24} and {COMPAT}; {machine.cores} cores"
    return _needs("run, ONNX on CPU", machine, ("onnxruntime",), note)


def _judge_standard_engine(machine: Machine) -> _StageVerdict:
    """Building with the standard TensorRT, which times its kernels on the GPU."""
    stage = "engine, standard TensorRT"
    if not machine.gpus and machine.jetpack is None:
        return _StageVerdict(
            stage, False, f"needs a GPU to build: {machine.reasons.get('GPU', 'none')}"
        )
    version = machine.versions.get("tensorrt")
    oldest = PROFILES[OPSET24].oldest_tensorrt or (0, 0)
    if version is not None and _release(version) < oldest:
        came = f"the {OPSET24} operators came with {dotted(oldest)}"
        profile = f"profiles {COMPAT_STATIC} and {COMPAT} only; {came}"
    else:
        profile = f"profiles {OPSET24} and {COMPAT}"
    if version is None and machine.jetpack is not None:
        why = (
            "JetPack's TensorRT is for the system's own python3 alone: .venv has to be of that, "
            "with --system-site-packages; JetPack 6.2's is too old for skipcat: skipcat-device "
            "runs on it (docs/jetson.md)"
        )
        return _StageVerdict(stage, False, why)
    return _needs(stage, machine, ("tensorrt",), profile)


def _judge_run_engine(machine: Machine) -> _StageVerdict:
    """Running an engine: a GPU, and a TensorRT that serves it."""
    stage = "run, engine"
    if not machine.gpus and machine.jetpack is None:
        why = f"needs a GPU: {machine.reasons.get('GPU', 'none found')}"
        return _StageVerdict(stage, False, f"{why}; run uses ONNX Runtime on the CPU instead")
    if "tensorrt" in machine.versions:
        return _StageVerdict(stage, True, f"standard TensorRT {machine.versions['tensorrt']}")
    served = [gpu for gpu in machine.gpus if gpu.capability in RTX_CAPABILITIES]
    if "tensorrt-rtx" in machine.versions and served:
        version = machine.versions["tensorrt-rtx"]
        return _StageVerdict(stage, True, f"TensorRT for RTX {version} on {served[0].name}")
    if not machine.gpus:
        return _StageVerdict(stage, False, "JetPack's TensorRT is not visible to this Python")
    capabilities = ", ".join(gpu.dotted_capability for gpu in machine.gpus)
    why = f"compute capability {capabilities} needs the standard TensorRT (make setup EXTRAS=trt)"
    return _StageVerdict(stage, False, why)


def _judge_plugin(machine: Machine) -> _StageVerdict:
    """Whether BlockSkipLinear runs as the plugin or as its function body."""
    stage = "block-skip plugin"
    version = machine.versions.get("tensorrt")
    has_gpu = bool(machine.gpus) or machine.jetpack is not None
    if version is None and "tensorrt-rtx" in machine.versions:
        return _StageVerdict(
            stage, False, "function body: TensorRT for RTX takes no plugins on Linux"
        )
    route = _plugin_route(version)
    if version is None or not has_gpu or _release(version) < (10, 0):
        return _StageVerdict(stage, False, route)
    embeds = _release(version) >= _FIRST_EMBEDDING_TENSORRT
    embedding = "; or no library, with engine --embed-kernels" if embeds else ""
    if machine.plugin is None:
        compiler = machine.nvcc or "nvcc from PyPI"
        how = f"not built: make plugin (with {compiler}); then: {route}{embedding}"
        return _StageVerdict(stage, False, how)
    return _StageVerdict(stage, True, f"{machine.plugin}; {route}{embedding}")


def _judge_cpu_kernels(machine: Machine) -> _StageVerdict:
    """Whether products of codes in the profile `cpu` run in our kernels or as function bodies."""
    why = machine.no_cpu_kernels
    if why is not None:
        return _StageVerdict("CPU kernels", False, f"function body, about half as fast: {why}")
    return _StageVerdict("CPU kernels", True, "compiled by this machine's C++ compiler, once")


def _version_note(name: str, machine: Machine) -> str:
    """What is worth knowing beside a library's version."""
    if name not in machine.versions:
        return "not installed"
    if name == "onnxruntime":
        return ", ".join(machine.providers) or machine.reasons.get("providers", "")
    if name == "torch" and machine.versions[name].endswith("+cpu"):
        return "built without CUDA"
    return "package metadata"


def _find_nvcc() -> str | None:
    """Version and place of the CUDA compiler."""
    path = local_nvcc()
    try:
        return f"{nvcc_release(path)} ({path})" if path else None
    except InputError:
        return None


def _installed_versions() -> dict[str, str]:
    """Versions of the libraries the stages need, by the names of _DISTRIBUTIONS."""
    versions = {}
    for name, distributions in _DISTRIBUTIONS.items():
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
