"""Most memory that a process has had at once."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def peak_bytes(process_id: int | None = None) -> int:
    """Largest resident memory of a running process so far, in bytes.

    Linux tells it of the program that now runs: `getrusage` would count what the process held
    before it became that program, so that a small child of a large parent looks large.

    Args:
        process_id: of a process of this machine; by default this one.

    Raises:
        OSError: another process is asked for, and /proc does not tell of it.
    """
    status = Path(f"/proc/{process_id or 'self'}/status")
    try:
        lines = status.read_text(encoding="utf-8").splitlines()
    except OSError:
        if process_id is not None:
            raise
        return peak_of_usage(resource.getrusage(resource.RUSAGE_SELF))
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def peak_of_usage(usage: resource.struct_rusage) -> int:
    """The kernel's count of a process that may be gone, in bytes."""
    return usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss * 1024
