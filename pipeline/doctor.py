"""For each stage of the pipeline: does it work on this machine, and why.

Everything but `examine` judges what was found and touches nothing, so that a test can ask about a
machine it does not have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from pipeline.engine.plugin_library import BUILT_PLUGIN
from pipeline.export.contract import COMPAT, OPSET24, PROFILES, dotted
from pipeline.gpu import RTX_CAPABILITIES, capability_name
from pipeline.machine import CPU_FLAGS, DISTRIBUTIONS, Machine, look
from trt_plugins.block_skip.aot import OLDEST_TENSORRT as _FIRST_EMBEDDING_TENSORRT

_GIBIBYTE = 1 << 30
_RTX_TARGETS = ", ".join(map(capability_name, RTX_CAPABILITIES)).upper()


@dataclass(frozen=True)
class StageVerdict:
    """Whether one stage of the pipeline works here, and why."""

    stage: str
    works: bool
    why: str


def examine() -> Machine:
    """This machine, with the plugin library that `make plugin` built, if it did."""
    return replace(look(), plugin=str(BUILT_PLUGIN) if BUILT_PLUGIN.is_file() else None)


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


def stages(machine: Machine) -> list[StageVerdict]:
    """Each stage of the pipeline: does it work on this machine, and why."""
    return [
        _needs("compress", machine, ("torch", "transformers"), "needs no GPU"),
        _needs("recover", machine, ("torch", "transformers", "peft"), "needs no GPU"),
        _needs("export", machine, ("torch", "transformers", "onnx", "onnxscript"), "needs no GPU"),
        _judge_onnx_cpu(machine),
        _needs(
            "genai", machine, ("onnxruntime-genai",), "runs the export by its genai_config.json"
        ),
        _needs("engine, RTX", machine, ("tensorrt-rtx",), f"no GPU needed; targets {_RTX_TARGETS}"),
        _judge_standard_engine(machine),
        _judge_run_engine(machine),
        _judge_plugin(machine),
    ]


_EXTRA_OF = {
    "onnxruntime": "cpu",
    "onnxruntime-genai": "cpu",
    "tensorrt": "trt",
    "tensorrt-rtx": "rtx",
    "peft": "recover",
}


def _needs(stage: str, machine: Machine, names: Iterable[str], note: str) -> StageVerdict:
    """A stage that works wherever its packages are installed."""
    names = tuple(names)
    missing = [name for name in names if name not in machine.versions]
    if not missing:
        found = ", ".join(f"{name} {machine.versions[name]}" for name in names)
        return StageVerdict(stage, True, f"{found}; {note}")
    extras = ",".join(sorted({_EXTRA_OF[name] for name in missing if name in _EXTRA_OF}))
    cure = f"make setup EXTRAS={extras}" if extras else "make setup"
    return StageVerdict(stage, False, f"not installed: {', '.join(missing)} ({cure})")


def _judge_onnx_cpu(machine: Machine) -> StageVerdict:
    """ONNX Runtime on the CPU, and which export profile it understands."""
    version = machine.versions.get("onnxruntime")
    oldest = PROFILES[OPSET24].oldest_onnxruntime
    if version is not None and _release(version) < oldest:
        came = f"TensorScatter came with {dotted(oldest)}"
        why = f"onnxruntime {version}: the {COMPAT} profile only; {came}"
        return StageVerdict("run, ONNX on CPU", True, why)
    note = f"profiles {OPSET24} and {COMPAT}; {machine.cores} cores"
    return _needs("run, ONNX on CPU", machine, ("onnxruntime",), note)


def _judge_standard_engine(machine: Machine) -> StageVerdict:
    """Building with the standard TensorRT, which times its kernels on the GPU."""
    stage = "engine, standard TensorRT"
    if not machine.gpus and machine.jetpack is None:
        return StageVerdict(
            stage, False, f"needs a GPU to build: {machine.reasons.get('GPU', 'none')}"
        )
    version = machine.versions.get("tensorrt")
    oldest = PROFILES[OPSET24].oldest_tensorrt or (0, 0)
    if version is not None and _release(version) < oldest:
        profile = f"{COMPAT} profile only; the {OPSET24} operators came with {dotted(oldest)}"
    else:
        profile = f"profiles {OPSET24} and {COMPAT}"
    if version is None and machine.jetpack is not None:
        why = "JetPack's TensorRT is not visible here: .venv needs --system-site-packages"
        return StageVerdict(stage, False, why)
    return _needs(stage, machine, ("tensorrt",), profile)


def _judge_run_engine(machine: Machine) -> StageVerdict:
    """Running an engine: a GPU, and a TensorRT that serves it."""
    stage = "run, engine"
    if not machine.gpus and machine.jetpack is None:
        why = f"needs a GPU: {machine.reasons.get('GPU', 'none found')}"
        return StageVerdict(stage, False, f"{why}; run uses ONNX Runtime on the CPU instead")
    if "tensorrt" in machine.versions:
        return StageVerdict(stage, True, f"standard TensorRT {machine.versions['tensorrt']}")
    served = [gpu for gpu in machine.gpus if gpu.capability in RTX_CAPABILITIES]
    if "tensorrt-rtx" in machine.versions and served:
        version = machine.versions["tensorrt-rtx"]
        return StageVerdict(stage, True, f"TensorRT for RTX {version} on {served[0].name}")
    if not machine.gpus:
        return StageVerdict(stage, False, "JetPack's TensorRT is not visible to this Python")
    capabilities = ", ".join(gpu.dotted_capability for gpu in machine.gpus)
    why = f"compute capability {capabilities} needs the standard TensorRT (make setup EXTRAS=trt)"
    return StageVerdict(stage, False, why)


def _judge_plugin(machine: Machine) -> StageVerdict:
    """Whether BlockSkipLinear runs as the plugin or as its function body."""
    stage = "block-skip plugin"
    version = machine.versions.get("tensorrt")
    has_gpu = bool(machine.gpus) or machine.jetpack is not None
    if version is None and "tensorrt-rtx" in machine.versions:
        return StageVerdict(
            stage, False, "function body: TensorRT for RTX takes no plugins on Linux"
        )
    route = _plugin_route(version)
    if version is None or not has_gpu or _release(version) < (10, 0):
        return StageVerdict(stage, False, route)
    embeds = _release(version) >= _FIRST_EMBEDDING_TENSORRT
    embedding = "; or no library, with engine --embed-kernels" if embeds else ""
    if machine.plugin is None:
        compiler = machine.nvcc or "nvcc from PyPI"
        how = f"not built: make plugin (with {compiler}); then: {route}{embedding}"
        return StageVerdict(stage, False, how)
    return StageVerdict(stage, True, f"{machine.plugin}; {route}{embedding}")


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
            f"{machine.ram_free_bytes / _GIBIBYTE:.1f} GiB free",
            f"of {machine.ram_bytes / _GIBIBYTE:.1f} GiB",
        ),
        ("Disk", f"{machine.disk_free_bytes / _GIBIBYTE:.1f} GiB free", "where this was started"),
    ]
    for gpu in machine.gpus:
        memory = f"{gpu.memory_mib} MiB" if gpu.memory_mib else "memory shared with the CPU"
        value = f"{gpu.name}, {memory}, compute capability {gpu.dotted_capability}"
        rows.append(("GPU", value, f"nvidia-smi, driver {gpu.driver}"))
    if not machine.gpus:
        rows.append(("GPU", "none", machine.reasons.get("GPU", "")))
    rows.append(("JetPack", machine.jetpack or "no", machine.reasons.get("JetPack", "")))
    rows.append(("nvcc", machine.nvcc or "no", machine.reasons.get("nvcc", "")))
    for name in DISTRIBUTIONS:
        rows.append((name, machine.versions.get(name, "no"), _version_note(name, machine)))
    return rows


def _version_note(name: str, machine: Machine) -> str:
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
