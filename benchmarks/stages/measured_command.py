"""Run a command line and take its wall time, its peak memory and the load it ran under.

The process that imports this must stay small: Linux lets a child inherit its parent's peak.
"""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.bench.measure import load_average
from pipeline.errors import PipelineError
from pipeline.memory import peak_of_usage

POLL_SECONDS = 0.05
LOG_TAIL_LINES = 15


@dataclass(frozen=True)
class Cost:
    """What a command took.

    Attributes:
        seconds: wall time.
        cpu_seconds: of all cores together; the better measure on a machine that others use too.
        peak_bytes: largest resident memory of the process and all its descendants together.
        process_peak_bytes: the largest that any one of them reached, as the kernel counted it.
        unmapped_peak_bytes: as `peak_bytes`, without the pages of files that are mapped: those the
            kernel takes back whenever it needs memory.
        load_average: of the last minute, before and after; above the cores, `seconds` is too long.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    process_peak_bytes: int
    unmapped_peak_bytes: int
    load_average: tuple[float, float]


def run_measured(command: Sequence[str], log: Path, environment: dict[str, str]) -> Cost:
    """Run `command` to its end with its output in `log`.

    The sum over the tree is polled and can miss a short peak; the kernel's count per process
    misses none, but does not add up. The larger of the two is the peak.

    Raises:
        PipelineError: the command failed; says how its log ends.
    """
    load_before = load_average()
    started = time.perf_counter()
    with log.open("wb") as output:
        child = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        tree_peak, unmapped_peak, status, usage = watch(child)
    seconds = time.perf_counter() - started
    if status != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        raise PipelineError(
            f"A measured command ended with status {status}.",
            where=" ".join(command),
            observed="\n".join(lines[-LOG_TAIL_LINES:]),
        )
    process_peak = peak_of_usage(usage)
    return Cost(
        seconds=round(seconds, 1),
        cpu_seconds=round(usage.ru_utime + usage.ru_stime, 1),
        peak_bytes=max(tree_peak, process_peak),
        process_peak_bytes=process_peak,
        unmapped_peak_bytes=unmapped_peak,
        load_average=(load_before, load_average()),
    )


def watch(child: subprocess.Popen[bytes]) -> tuple[int, int, int, resource.struct_rusage]:
    """Wait for `child`: largest polled sums of its tree, its status, the kernel's count."""
    process = psutil.Process(child.pid)
    peaks = (0, 0)
    try:
        while True:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                # Popen must not wait for a child that is gone.
                child.returncode = os.waitstatus_to_exitcode(status)
                return *peaks, child.returncode, usage
            now = tree_bytes(process)
            peaks = (max(peaks[0], now[0]), max(peaks[1], now[1]))
            time.sleep(POLL_SECONDS)
    finally:
        if child.returncode is None:
            child.kill()
            child.wait()


def tree_bytes(process: psutil.Process) -> tuple[int, int]:
    """Resident memory of a process and its descendants now, with and without mapped files."""
    total = mapped = 0
    try:
        members = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0, 0
    for member in members:
        try:
            memory = member.memory_info()
            total += memory.rss
            mapped += memory.shared
        except psutil.NoSuchProcess:
            continue
    return total, total - mapped
