"""Memory: what a process has had of it, and has read; whether there will be enough; its names."""

from __future__ import annotations

import contextlib
import ctypes
import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import ResourceError, UsageError

if TYPE_CHECKING:
    import resource


def peak_bytes(process_id: int | None = None) -> int:
    """Largest resident memory of a running process so far, in bytes.

    Linux tells it of the program that now runs: `getrusage` would count what the process held
    before it became that program, so that a small child of a large parent looks large.

    Args:
        process_id: of a process of this machine; by default this one.

    Raises:
        OSError: another process is asked for, and there is no /proc that tells of it.
    """
    status = Path(f"/proc/{process_id or 'self'}/status")
    try:
        lines = status.read_text(encoding="utf-8").splitlines()
    except OSError:
        if process_id is not None:
            raise
        return _own_peak_bytes()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _own_peak_bytes() -> int:
    """The same of this process, without Linux's /proc."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(getattr(psutil.Process().memory_info(), "peak_wset"))  # noqa: B009 - of Windows
    return peak_of_usage(resource.getrusage(resource.RUSAGE_SELF))


def peak_of_children_bytes() -> int:
    """Largest resident memory of a child process that has ended, in bytes; 0 without Unix's count.

    Of a small child the kernel may give what this process held when it began it.
    """
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return peak_of_usage(resource.getrusage(resource.RUSAGE_CHILDREN))


def peak_of_usage(usage: resource.struct_rusage) -> int:
    """The kernel's count of a process that may be gone, in bytes."""
    return usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss * 1024


def disk_read_bytes() -> int | None:
    """What this process has had read from disks so far, as Linux counts it; None elsewhere."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def forget_peak() -> None:
    """Let the kernel count this process's largest memory anew (see `peak_bytes`).

    Raises:
        OSError: only Linux does.
    """
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def return_free_memory() -> None:
    """Give what is free on the heap back to the system, where the C library is glibc.

    Large temporaries that were freed stay with the process otherwise, and so does a heap that was
    scattered by tensors of all sizes.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def require_free_memory(
    needed_bytes: int, what: str, *, where: object = None, of: str = "", change: str
) -> None:
    """Refuse what memory cannot hold: the kernel promises more, and kills who uses it.

    Args:
        needed_bytes: of the CPU's memory.
        what: to say where there are too few.
        where: file, folder or flag.
        of: said before their number.
        change: what the user can do about it.

    Raises:
        ResourceError: more than is free.
    """
    import psutil

    free_bytes = psutil.virtual_memory().available
    if needed_bytes > free_bytes:
        raise ResourceError(
            what,
            where=where,
            observed=f"{of}{needed_bytes / 1e9:.1f} GB",
            expected=f"at most {free_bytes / 1e9:.1f} GB, which are free",
            change=change,
        )


def free_memory() -> tuple[int, int]:
    """Memory and swap that are free on this machine, in bytes; without psutil on Linux alone."""
    try:
        import psutil
    except ImportError:  # a board's own Python
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        kib = dict(re.findall(r"^(\w+): +(\d+) kB", text, re.MULTILINE))
        return int(kib["MemAvailable"]) * 1024, int(kib["SwapFree"]) * 1024
    return psutil.virtual_memory().available, psutil.swap_memory().free


def swap_advice(needed_bytes: int, free_bytes: int) -> str:
    """The commands that add a swap file for what memory lacks, in whole GB and one to spare."""
    size = math.ceil((needed_bytes - free_bytes) / 1e9) + 1
    return (
        f"add {size} GB of swap (sudo fallocate -l {size}G /swapfile && sudo chmod 600 /swapfile "
        "&& sudo mkswap /swapfile && sudo swapon /swapfile)"
    )


def parse_bytes(text: str, flag: str) -> int:
    """The bytes that `60MB`, `1.5 GiB` or `60000000` name.

    Raises:
        UsageError: it names none, or not one.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmg]?)(i?)b?\s*", text.lower())
    size = 0
    if found:
        number, prefix, binary = found.groups()
        base = 1024 if binary else 1000
        size = int(float(number) * base ** ("", "k", "m", "g").index(prefix))
    if size < 1:
        raise UsageError(
            "This is no number of bytes.", where=flag, observed=text, expected="60MB or 1.5GiB"
        )
    return size
