"""NVIDIA GPUs and Jetsons: which are here, and what their compute capabilities are called.

Standard library only: the set-up and `make plugin` ask before anything is installed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

Capability = tuple[int, int]

ORIN: Capability = (8, 7)
THOR: Capability = (11, 0)
# Whose memory is the CPU's too: Jetsons and DGX Spark.
SHARING_CAPABILITIES: tuple[Capability, ...] = (ORIN, THOR, (12, 1))
# What TensorRT for RTX builds for; the standard one builds for the GPU that it runs on.
RTX_CAPABILITIES: tuple[Capability, ...] = ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1))
TEGRA_RELEASE = Path("/etc/nv_tegra_release")
_DEVICE_TREE_MODEL = Path("/proc/device-tree/model")
_DEVICE_TREE_COMPATIBLE = Path("/proc/device-tree/compatible")
# L4T release to JetPack and the TensorRT it ships.
_JETPACKS = {
    (36, 3): "JetPack 6.0, TensorRT 8.6",
    (36, 4): "JetPack 6.1 or 6.2, TensorRT 10.3",
    (36, 5): "JetPack 6.2.2, TensorRT 10.3",
    (38, 2): "JetPack 7.0 (Thor only), TensorRT 10.13",
    (38, 4): "JetPack 7.1 (Thor only), TensorRT 10.13",
    (39, 2): "JetPack 7.2, TensorRT 10.16",
}


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU.

    Attributes:
        name: as nvidia-smi or the device tree has it.
        capability: (major, minor).
        memory_mib: its own memory; None on a Jetson, which shares that of the CPU.
        driver: version; empty where only the device tree was read.
    """

    name: str
    capability: Capability
    memory_mib: int | None = None
    driver: str = ""

    @property
    def dotted_capability(self) -> str:
        """Such as '9.0'."""
        return "{}.{}".format(*self.capability)


def capability_name(capability: Capability) -> str:
    """(8, 6) -> 'sm86'."""
    return f"sm{capability[0]}{capability[1]}"


def find_gpus() -> tuple[tuple[Gpu, ...], str]:
    """NVIDIA GPUs by nvidia-smi, and what was seen if there are none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return (), "nvidia-smi is not installed"
    query = "--query-gpu=name,compute_cap,memory.total,driver_version"
    command = [program, query, "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return (), f"nvidia-smi fails: {error}"
    if answer.returncode != 0:
        lines = (answer.stdout or answer.stderr).strip().splitlines()
        return (), f"nvidia-smi fails: {lines[0] if lines else f'status {answer.returncode}'}"
    gpus = _parse_gpus(answer.stdout, _find_jetson())
    return gpus, "nvidia-smi" if gpus else "nvidia-smi lists none"


def find_gpu() -> Gpu | None:
    """The first GPU that nvidia-smi lists, or the one of a Jetson module; None without either."""
    gpus, _ = find_gpus()
    return gpus[0] if gpus else _find_jetson()


def _parse_gpus(csv: str, jetson: Gpu | None = None) -> tuple[Gpu, ...]:
    """GPUs of nvidia-smi's CSV.

    A Jetson may print [N/A] for its capability, which is then that of `jetson`, and does for
    memory that it shares with the CPU. A GPU whose capability nobody knows is left out.
    """
    gpus = []
    for line in csv.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != 4:
            continue
        name, said, memory, driver = cells
        numbers = re.fullmatch(r"(\d+)\.(\d+)", said)
        capability = (int(numbers[1]), int(numbers[2])) if numbers else jetson and jetson.capability
        if capability:
            gpus.append(Gpu(name, capability, int(memory) if memory.isdigit() else None, driver))
    return tuple(gpus)


def _find_jetson(
    model_file: Path = _DEVICE_TREE_MODEL, compatible_file: Path = _DEVICE_TREE_COMPATIBLE
) -> Gpu | None:
    """The GPU of a Jetson, by the chip in the device tree: its nvidia-smi may not say.

    Boards are named by whoever sells them; the chip is named by NVIDIA. Where the tree does not
    name it, the board's name may.
    """
    model, chips = _read_tree(model_file), _read_tree(compatible_file)
    name = " ".join(model)
    for word, chip, capability in (("Orin", "tegra234", ORIN), ("Thor", "tegra264", THOR)):
        if f"nvidia,{chip}" in chips or (not chips and word in name):
            return Gpu(name or f"Jetson {word}", capability)
    return None


def _read_tree(path: Path) -> list[str]:
    """The words of a property of the device tree; none where it is not there."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [word for word in text.strip("\n ").split("\x00") if word]


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
    known = _JETPACKS.get((major, minor), "JetPack not known to this version of skipcat")
    return f"L4T {major}.{minor}{'.' + match.group(3) if match.group(3) else ''}: {known}"
