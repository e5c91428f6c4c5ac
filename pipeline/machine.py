"""The processor of this machine: its cores, and the instructions that kernels are quick with."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

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


_GROUPS, _OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_CPUINFO = Path("/proc/cpuinfo")
_CPUS = Path("/sys/devices/system/cpu")
_OMP = "OMP_NUM_THREADS"
# Threads that the user allows, where that was said.
_allowed: list[int] = []


def usable_cores() -> int:
    """Cores this process may keep busy: those it may run on, and no more than its container's."""
    return max(1, int(min(len(_cores()), _granted_cores())))


def product_threads(cpus: Path = _CPUS) -> int:
    """Threads for products: as many as are allowed; else one to a physical core.

    Two on one core would share its multipliers.
    """
    if _allowed:
        return _allowed[-1]
    siblings = set()
    for core in _cores():
        try:
            text = (cpus / f"cpu{core}" / "topology" / "thread_siblings_list").read_text()
        except OSError:
            text = str(core)
        siblings.add(text.strip())
    return max(1, min(len(siblings), usable_cores()))


def allowed_threads() -> int | None:
    """Threads that the user allows; None where nothing was said."""
    return _allowed[-1] if _allowed else None


def share_cores() -> None:
    """Let OpenMP's threads sleep soon where they wait, for whoever else wants the core.

    They spin for milliseconds otherwise, and beside another program a spinning thread takes the
    time that the one it waits for needs. To sleep at once would cost small products a third when
    nobody else is there. What the user set stays. It counts if torch is not loaded yet.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if usable_cores() < len(_cores()):
        os.environ.setdefault(_OMP, str(usable_cores()))


@contextlib.contextmanager
def limited_threads(count: int) -> Iterator[None]:
    """Inside, so many threads compute: PyTorch's, ONNX Runtime's, and those of processes begun.

    PyTorch reads the environment as it is loaded, which it may be already.
    """
    torch, variable = sys.modules.get("torch"), os.environ.get(_OMP)
    own = None if torch is None else torch.get_num_threads()
    os.environ[_OMP] = str(count)
    if torch is not None:
        torch.set_num_threads(count)
    _allowed.append(count)
    try:
        yield
    finally:
        _allowed.pop()
        os.environ.pop(_OMP)
        if variable is not None:
            os.environ[_OMP] = variable
        if torch is not None:
            torch.set_num_threads(own)


def _cores() -> list[int]:
    """Numbers of the cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _granted_cores(groups: Path = _GROUPS, own: Path = _OWN_GROUP) -> float:
    """Cores' worth of time that its control groups (version 2) grant; infinite without a limit."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return math.inf
    path = next((line[3:] for line in lines if line.startswith("0::")), "/").lstrip("/")
    folder, granted = groups / path, math.inf
    for place in (folder, *folder.parents):
        if place == groups.parent:
            break
        try:
            quota, period = (place / "cpu.max").read_text(encoding="utf-8").split()
            granted = min(granted, math.ceil(int(quota) / int(period)))
        except (OSError, ValueError):  # the outermost group has none; "max" limits nothing
            continue
    return granted


@functools.cache
def is_of_amd(cpuinfo: Path = _CPUINFO) -> bool:
    """Whether AMD made this processor; False where /proc does not tell."""
    return re.search(r"^vendor_id\s*:\s*AuthenticAMD$", _told(cpuinfo), re.MULTILINE) is not None


def cpu_flags(cpuinfo: Path = _CPUINFO) -> tuple[str, ...]:
    """Those of CPU_FLAGS that this processor has; empty where /proc does not tell."""
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", _told(cpuinfo), re.MULTILINE)
    present = set(line.group(1).split()) if line else set()
    return tuple(flag for flag in CPU_FLAGS if flag in present)


def _told(cpuinfo: Path) -> str:
    """What /proc says of the processor; empty where it does not."""
    try:
        return cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
