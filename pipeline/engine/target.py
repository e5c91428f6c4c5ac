"""What to build for: a `--target` word, and what this machine has, resolved to a `Target`."""

from __future__ import annotations

import importlib
import importlib.util
import re
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.errors import InputError, MissingPackageError, UsageError
from pipeline.gpu import (
    ORIN,
    RTX_CAPABILITIES,
    SHARING_CAPABILITIES,
    THOR,
    Capability,
    Gpu,
    capability_name,
    find_gpu,
)

Flavour = Literal["rtx", "tensorrt", "cpu"]
# Module, package and extra of each TensorRT.
_LIBRARIES: dict[str, tuple[str, str, str]] = {
    "rtx": ("tensorrt_rtx", "tensorrt-rtx-cu13", "rtx"),
    "tensorrt": ("tensorrt", "tensorrt", "trt"),
}
# Those that only the standard one serves, as people call them.
_NAMES = {ORIN: "Jetson Orin", (9, 0): "Hopper", (10, 0): "Blackwell B200", THOR: "Jetson Thor"}
_DEFAULT_CAPABILITY: Capability = (8, 6)
_ACCEPTED = "auto, cpu, tensorrt, orin, or a capability such as sm86, 8.6 or rtx:sm86"


@dataclass(frozen=True)
class _Host:
    """What decides `--target auto`: the GPU, and whether the package `tensorrt` is installed."""

    gpu: Gpu | None
    has_standard: bool


@dataclass(frozen=True)
class Target:
    """What to build for.

    Attributes:
        flavour: `rtx` (TensorRT for RTX), `tensorrt` (standard TensorRT) or `cpu` (no engine).
        compute_capability: (major, minor) of the GPU; None for `cpu`.
        reason: why this was chosen, for the user and the manifest.
    """

    flavour: Flavour
    compute_capability: Capability | None
    reason: str

    @property
    def shares_memory(self) -> bool:
        """Whether the CPU is in the GPU's memory, as on a Jetson."""
        return self.compute_capability in SHARING_CAPABILITIES

    def __str__(self) -> str:
        if self.compute_capability is None:
            return self.flavour
        return f"{self.flavour}:{capability_name(self.compute_capability)}"

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the manifest and `--dry-run --json`."""
        capability = self.compute_capability
        return {
            "flavour": self.flavour,
            "compute_capability": None if capability is None else list(capability),
            "reason": self.reason,
        }

    def require_package(self) -> None:
        """Raise MissingPackageError when the flavour's Python package is not installed."""
        module, package, extra = _LIBRARIES[self.flavour]
        if importlib.util.find_spec(module) is None:
            raise MissingPackageError(package, extra, f"build an engine for {self}")


def load_library(flavour: str, purpose: str) -> Any:
    """The TensorRT of a flavour; raise MissingPackageError when it cannot be imported."""
    module, package, extra = _LIBRARIES[flavour]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(package, extra, purpose) from error


def resolve_target(text: str, host: _Host | None = None) -> Target:
    """Turn a `--target` word into what to build for.

    Args:
        text: `auto`, `cpu`, `tensorrt`, `orin`, `sm86`, `SM89`, `8.6`, `rtx:sm86`.
        host: what to decide by; None looks at this machine.

    Raises:
        InputError: nothing that is installed here can build for that GPU.
        MissingPackageError: only standard TensorRT can, and it is not installed.
        UsageError: not a target.
    """
    word = text.strip().lower()
    if word == "cpu":
        return Target("cpu", None, "asked for: ONNX Runtime runs the ONNX folder as it is")
    host = _look() if host is None else host
    if word == "auto":
        return _choose(host)
    if word in ("tensorrt", "orin"):
        return _standard_target(host, ORIN if word == "orin" else None)
    rtx_only = word.startswith("rtx:")
    capability = _parse_capability(word.removeprefix("rtx:"), text)
    if capability in RTX_CAPABILITIES:
        return Target("rtx", capability, f"asked for: {text}")
    if rtx_only:
        raise _unsupported(capability)
    return _standard_target(host, capability)


def _choose(host: _Host) -> Target:
    """`--target auto`: standard TensorRT where it is, else RTX, for the GPU that is here."""
    gpu = host.gpu
    if gpu is None:
        return Target(
            "rtx",
            _DEFAULT_CAPABILITY,
            "no NVIDIA GPU here, so built ahead of time for the commonest RTX generation "
            f"({capability_name(_DEFAULT_CAPABILITY)}); name another with --target",
        )
    here = f"{gpu.name} ({capability_name(gpu.capability)}) is here"
    if host.has_standard:
        return Target("tensorrt", gpu.capability, f"{here} and standard TensorRT is installed")
    if gpu.capability in RTX_CAPABILITIES:
        return Target("rtx", gpu.capability, f"{here} and standard TensorRT is not installed")
    raise MissingPackageError(
        "tensorrt", "trt", f"build for {gpu.name}, which TensorRT for RTX does not cover"
    )


def _standard_target(host: _Host, wanted: Capability | None) -> Target:
    """Standard TensorRT for the GPU of this machine, which must be `wanted` if that is given."""
    gpu = host.gpu
    if wanted is not None and (gpu is None or gpu.capability != wanted):
        raise _unsupported(wanted, gpu)
    if gpu is None:
        raise InputError(
            "Standard TensorRT needs an NVIDIA GPU to build, and there is none here.",
            change="run this on the machine with the GPU, or build for an RTX GPU ahead of time "
            "with --target sm86",
        )
    if not host.has_standard:
        raise MissingPackageError("tensorrt", "trt", f"build for {gpu.name}")
    return Target("tensorrt", gpu.capability, f"standard TensorRT for {gpu.name} of this machine")


def _unsupported(capability: Capability, gpu: Gpu | None = None) -> InputError:
    """The error for a GPU that TensorRT for RTX does not build for."""
    name = _generation_name(capability)
    here = f"this machine has {gpu.name if gpu else 'no NVIDIA GPU'}"
    return InputError(
        f"An engine for {name} ({capability_name(capability)}) cannot be built here: TensorRT for "
        "RTX does not cover it, and standard TensorRT builds only for the GPU it runs on.",
        observed=here,
        expected="TensorRT for RTX: " + ", ".join(map(capability_name, RTX_CAPABILITIES)),
        change=f"copy the ONNX folder to a machine with {name} and standard TensorRT (Orin: "
        "JetPack brings it; Hopper and data-centre GPUs: the package 'tensorrt'), and run "
        "skipcat engine with --target tensorrt there",
    )


def _parse_capability(word: str, text: str) -> Capability:
    """'sm86', '86' or '8.6' -> (8, 6).

    Raises:
        UsageError: none of these.
    """
    match = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", word)
    if match is None:
        raise UsageError("This is not a target.", observed=text, expected=_ACCEPTED)
    return int(match[1]), int(match[2])


def _look() -> _Host:
    """The GPU and the standard TensorRT package of this machine."""
    return _Host(find_gpu(), importlib.util.find_spec("tensorrt") is not None)


def _generation_name(capability: Capability) -> str:
    """What people call GPUs of a capability, where TensorRT for RTX does not cover them."""
    return _NAMES.get(capability, "this GPU")
