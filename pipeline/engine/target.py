"""What to build for: a `--target` word, and what this machine has, resolved to a `Target`."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.errors import InputError, MissingPackageError, UsageError

Flavour = Literal["rtx", "tensorrt", "cpu"]
Capability = tuple[int, int]

RTX_CAPABILITIES: tuple[Capability, ...] = ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1))
DEFAULT_CAPABILITY: Capability = (8, 6)
ORIN: Capability = (8, 7)
THOR: Capability = (11, 0)
NAMES = {(8, 7): "Jetson Orin", (9, 0): "Hopper", (10, 0): "Blackwell B200", (11, 0): "Jetson Thor"}
DEVICE_TREE_MODEL = Path("/proc/device-tree/model")
ACCEPTED = "auto, cpu, tensorrt, orin, or a capability such as sm86, 8.6 or rtx:sm86"


@dataclass(frozen=True)
class Gpu:
    """The first NVIDIA GPU of a machine."""

    name: str
    capability: Capability


@dataclass(frozen=True)
class Machine:
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

    def __str__(self) -> str:
        if self.compute_capability is None:
            return self.flavour
        return f"{self.flavour}:{capability_name(self.compute_capability)}"


def capability_name(capability: Capability) -> str:
    """(8, 6) -> 'sm86'."""
    return f"sm{capability[0]}{capability[1]}"


def resolve_target(text: str, machine: Machine | None = None) -> Target:
    """Turn a `--target` word into what to build for.

    Args:
        text: `auto`, `cpu`, `tensorrt`, `orin`, `sm86`, `SM89`, `8.6`, `rtx:sm86`.
        machine: what to decide by; None looks at this machine.

    Raises:
        InputError: nothing that is installed here can build for that GPU.
        MissingPackageError: only standard TensorRT can, and it is not installed.
        UsageError: not a target.
    """
    word = text.strip().lower()
    if word == "cpu":
        return Target("cpu", None, "asked for: ONNX Runtime runs the ONNX folder as it is")
    machine = look_at_machine() if machine is None else machine
    if word == "auto":
        return choose(machine)
    if word in ("tensorrt", "orin"):
        return standard_target(machine, ORIN if word == "orin" else None)
    rtx_only = word.startswith("rtx:")
    capability = parse_capability(word.removeprefix("rtx:"), text)
    if capability in RTX_CAPABILITIES:
        return Target("rtx", capability, f"asked for: {text}")
    if rtx_only:
        raise unsupported(capability)
    return standard_target(machine, capability)


def choose(machine: Machine) -> Target:
    """`--target auto`: standard TensorRT where it is, else RTX, for the GPU that is here."""
    gpu = machine.gpu
    if gpu is None:
        return Target(
            "rtx",
            DEFAULT_CAPABILITY,
            "no NVIDIA GPU here, so built ahead of time for the commonest RTX generation "
            f"({capability_name(DEFAULT_CAPABILITY)}); name another with --target",
        )
    here = f"{gpu.name} ({capability_name(gpu.capability)}) is here"
    if machine.has_standard:
        return Target("tensorrt", gpu.capability, f"{here} and standard TensorRT is installed")
    if gpu.capability in RTX_CAPABILITIES:
        return Target("rtx", gpu.capability, f"{here} and standard TensorRT is not installed")
    raise MissingPackageError(
        "tensorrt", "trt", f"build for {gpu.name}, which TensorRT for RTX does not cover"
    )


def standard_target(machine: Machine, wanted: Capability | None) -> Target:
    """Standard TensorRT for the GPU of this machine, which must be `wanted` if that is given."""
    gpu = machine.gpu
    if wanted is not None and (gpu is None or gpu.capability != wanted):
        raise unsupported(wanted, gpu)
    if gpu is None:
        raise InputError(
            "Standard TensorRT needs an NVIDIA GPU to build, and there is none here.",
            change="run this on the machine with the GPU, or build for an RTX GPU ahead of time "
            "with --target sm86",
        )
    if not machine.has_standard:
        raise MissingPackageError("tensorrt", "trt", f"build for {gpu.name}")
    return Target("tensorrt", gpu.capability, f"standard TensorRT for {gpu.name} of this machine")


def unsupported(capability: Capability, gpu: Gpu | None = None) -> InputError:
    """The error for a GPU that TensorRT for RTX does not build for."""
    name = NAMES.get(capability, "this GPU")
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


def parse_capability(word: str, text: str) -> Capability:
    """'sm86', '86' or '8.6' -> (8, 6).

    Raises:
        UsageError: none of these.
    """
    match = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", word)
    if match is None:
        raise UsageError("This is not a target.", observed=text, expected=ACCEPTED)
    return int(match[1]), int(match[2])


def look_at_machine() -> Machine:
    """The GPU and the standard TensorRT package of this machine."""
    return Machine(find_gpu(), importlib.util.find_spec("tensorrt") is not None)


def find_gpu() -> Gpu | None:
    """The first GPU that nvidia-smi lists, or the one of a Jetson module; None without either."""
    command = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return find_jetson()
    found = parse_gpu_list(answer.stdout) if answer.returncode == 0 else None
    return found or find_jetson()


def parse_gpu_list(listing: str) -> Gpu | None:
    """First 'name, 8.6' line of nvidia-smi's answer; Jetsons answer '[N/A]', which is skipped."""
    for line in listing.splitlines():
        match = re.fullmatch(r"\s*(.+?)\s*,\s*(\d+)\.(\d+)\s*", line)
        if match:
            return Gpu(match[1], (int(match[2]), int(match[3])))
    return None


def find_jetson(model_file: Path = DEVICE_TREE_MODEL) -> Gpu | None:
    """The GPU of a Jetson, by the module's name in the device tree: its nvidia-smi may not say."""
    try:
        model = model_file.read_text(encoding="utf-8", errors="replace").strip("\x00\n ")
    except OSError:
        return None
    for word, capability in (("Orin", ORIN), ("Thor", THOR)):
        if word in model:
            return Gpu(model, capability)
    return None
