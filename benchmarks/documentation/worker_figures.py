"""Figures of what tasks take, which any process may compute."""

from __future__ import annotations

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


WORKER_FIGURES = {
    "task-memory": Figure(("task_memory",), _task_memory),
    "task-memory/range": Figure(("task_memory",), _task_memory_range),
}
