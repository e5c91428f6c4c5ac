"""The processor of this machine: its cores, and the instructions that kernels are quick with."""

from __future__ import annotations

import os
import re
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
