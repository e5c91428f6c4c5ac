"""Figures of what tasks take, which any process may compute."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.documentation.markdown import Figure, table

_Json = dict[str, Any]


def _task_memory(found: _Json) -> list[str]:
    """Gigabytes of a process that computes a task of a 70B, by group."""
    tasks = list(found["widest"][0]["process_bytes"])
    rows = [
        [row["name"], *(f"{row['process_bytes'][task] / 1e9:.1f}" for task in tasks)]
        for row in found["widest"]
    ]
    return table(["GB", *tasks], rows)


def _task_memory_range(found: _Json) -> list[str]:
    shares = [row["taken_over_declared"] for row in found["rows"]]
    return [f"{min(shares):.2f} to {max(shares):.2f}"]


def _speed(found: _Json, shape: str) -> list[str]:
    """Of the last turn: by workers, by one process, and what the linear model says."""
    row = [row for row in found["rows"] if row["shape"] == shape][-1]
    by, alone = row["workers"]["seconds"], row["alone"]["seconds"]
    off = "more" if row["linear_error"] > 0 else "less"
    return [
        f"{by:,.0f} s by {row['tasks']['workers']} workers of one thread and {alone:,.0f} s by one "
        f"process of as many threads, {row['speed']:.2f} of its speed. Seconds of the tasks and of "
        f"the head over the cores are {row['linear_seconds']:,.0f}, "
        f"{abs(row['linear_error']):.0%} {off} than the wall clock"
    ]


WORKER_FIGURES = {
    "workers/whole": Figure(("workers",), partial(_speed, shape="4096x11008")),
    "workers/half": Figure(("workers",), partial(_speed, shape="2048x5504")),
    "task-memory": Figure(("task_memory",), _task_memory),
    "task-memory/range": Figure(("task_memory",), _task_memory_range),
}
