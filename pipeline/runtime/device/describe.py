"""What a board is, as JSON: what decides whether an engine fits it, and what it was measured on.

Made on the board, and read there or on another machine. What cannot be found out is null: nothing
is guessed.
"""

from __future__ import annotations

import contextlib
import platform
import re
import shutil
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError
from pipeline.gpu import TEGRA_RELEASE, read_jetpack
from pipeline.runtime.device.driver import Driver
from pipeline.runtime.device.engine import load_device_library

SCHEMA = 1
_SWAPS_KIB_COLUMN = 2
_GPU_NAMES = ("gpu", "ga10b", "gb10b")  # of the kernel's: in general, on Orin, on Thor


def describe(driver: Driver | None, root: Path = Path("/")) -> dict[str, Any]:
    """Describe this machine.

    Args:
        driver: of its GPU; None where there is none that can be used.
        root: where its files lie.
    """
    return {
        "schema": SCHEMA,
        "board": _text(root / "proc/device-tree/model"),
        "compatible": _words(root / "proc/device-tree/compatible"),
        "jetpack": read_jetpack(root / TEGRA_RELEASE.relative_to("/")),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "glibc": platform.libc_ver()[1] or None,
        "tensorrt": _tensorrt_version(),
        "gpu": None if driver is None else _gpu(driver),
        "memory": _memory(root / "proc"),
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "power": _power(root),
    }


def open_driver() -> tuple[Driver | None, str | None]:
    """The driver of this machine's GPU, or why there is none."""
    try:
        return Driver(), None
    except PipelineError as error:
        return None, str(error)


def _tensorrt_version() -> str | None:
    try:
        return str(load_device_library().__version__)
    except PipelineError:
        return None


def _gpu(driver: Driver) -> dict[str, Any]:
    free, total = driver.memory_bytes()
    return {
        "name": driver.name,
        "compute_capability": list(driver.capability),
        "cuda": "{}.{}".format(*driver.cuda),
        "shares_memory": driver.integrated,
        "free_bytes": free,
        "total_bytes": total,
    }


def _memory(proc: Path) -> dict[str, int | None]:
    """Memory of the CPU, and what there is to swap to; in bytes."""
    text = _text(proc / "meminfo") or ""
    found = {
        name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+): +(\d+) kB", text, re.MULTILINE)
    }
    swaps = (_text(proc / "swaps") or "").splitlines()[1:]
    zram = [int(line.split()[_SWAPS_KIB_COLUMN]) for line in swaps if line.startswith("/dev/zram")]
    return {
        "total_bytes": found.get("MemTotal"),
        "available_bytes": found.get("MemAvailable"),
        "contiguous_free_bytes": found.get("CmaFree"),
        "swap_bytes": found.get("SwapTotal"),
        "swap_in_memory_bytes": sum(zram) * 1024,
    }


def _power(root: Path) -> dict[str, Any]:
    """The power mode, and the clocks of the GPU that it allows, as the kernel says them."""
    mode = re.search(r"pmode:(\w+)", _text(root / "var/lib/nvpmodel/status") or "")
    clocks = {}
    named = (path for word in _GPU_NAMES for path in root.glob(f"sys/class/devfreq/*{word}*"))
    for folder in sorted(set(named)):
        for name in ("cur_freq", "max_freq"):
            text = _text(folder / name)
            if text is not None and text.isdecimal():
                clocks[f"{folder.name} {name} hz"] = int(text)
    return {"mode": mode[1] if mode else None, "clocks": clocks}


def _words(path: Path) -> list[str] | None:
    """The texts of a property of the device tree."""
    text = _text(path)
    return text.split("\x00") if text else None


def _text(path: Path) -> str | None:
    """A small file of the kernel's; None where it is not there or cannot be read."""
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").strip("\x00\n ")
    return None
