"""Tasks on a Ray cluster: one that is begun for this run and ends with it, or one that is there.

Ray schedules, moves arguments and results through its object store, writes there what memory does
not hold, and computes again what a lost worker or machine had. Tensors travel as arrays, which a
worker reads where they lie.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import __version__
from pipeline.errors import (
    InputError,
    MissingPackageError,
    PipelineError,
    ResourceError,
    UsageError,
    shortage_of,
)
from pipeline.machine import cpu_flags, limited_threads
from pipeline.memory import forget_peak, peak_bytes
from pipeline.progress import note
from pipeline.workers.carried_tensors import carry_tensors_as_arrays
from pipeline.workers.workers import Result, Value, Workers

_LOCAL = "local"
# Of a task whose worker was lost.
_TIMES_AGAIN = 1
# Each worker has one to compute and one to go on with.
_TASKS_A_WORKER = 2
# A task that takes twice what it declared is ended: threads and libraries take some besides.
_LENIENCE, _OF_LIBRARIES_BYTES = 2, 1 << 29
# How Ray says that its processes were not begun in time.
_NOT_YET = ("Initialization failure from server", "timed out during startup")
_MEMORY, _CPU = "memory", "CPU"
_EXPECTED_MEMORY = "a machine of the cluster with as much memory for Ray (ray start --memory)"


@contextlib.contextmanager
def opened(place: str, count: int | None, threads: int) -> Iterator[Workers]:
    """Inside, a cluster is at hand; a cluster that is begun here ends with it.

    Args:
        place: `local:...` begins one on this machine; else the address of one.
        count: workers of a cluster that is begun.
        threads: that compute one task.

    Raises:
        MissingPackageError: Ray is not installed.
        UsageError: no cluster answers.
        InputError: a machine of the cluster has another version of this program or of torch.
    """
    ray = _ray()
    try:
        context = _connected(ray, place, _settings(place, count, threads))
        workers = _RayWorkers(ray, threads)
        workers.require_alike()
        note(workers.summary(getattr(context, "dashboard_url", None)))
        yield workers
    finally:
        ray.shutdown()


def _connected(ray: Any, place: str, settings: dict[str, Any], tries: int = 2) -> Any:
    """What `ray.init` returns; UsageError where no cluster answers.

    A cluster begins a process for each client, and `local` the processes of a cluster; Ray gives
    them half a minute: on a machine that is busy they may not be there in time.
    """
    try:
        return ray.init(**settings)
    except Exception as error:  # Ray raises nothing narrower where its half a minute is over
        lines = str(error).strip().splitlines() or [type(error).__name__]
        late = any(message in lines[0] for message in _NOT_YET)
        if late and tries > 1:
            note(f"{place} took too long to begin a process for this run; asking once more")
            ray.shutdown()
            return _connected(ray, place, settings, tries - 1)
        raise UsageError(
            "No Ray cluster answers there.",
            where=f"--workers {place}",
            observed=lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1].strip()}",
            change="try again when the machine is less busy, or with fewer workers"
            if late
            else "begin one with `ray start --head`, or pass --workers local",
        ) from error


def _ray() -> Any:
    """The module; it tells nobody that it is used."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MissingPackageError("ray", "distributed", "compute in other processes") from error
    return ray


def _settings(place: str, count: int | None, threads: int) -> dict[str, Any]:
    """Arguments of `ray.init`."""
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if count is not None:
        return {"address": _LOCAL, "num_cpus": count * threads, **quiet}
    return {"address": place, **quiet}


@dataclass(frozen=True)
class _Machine:
    """What bytes depend on, of the machine of a worker."""

    skipcat: str
    torch: str
    numpy: str
    processor: tuple[str, ...]

    @classmethod
    def here(cls) -> _Machine:
        return cls(__version__, torch.__version__, np.__version__, cpu_flags())


class _RayWorkers:
    """The workers of a cluster that this process is connected to (see `Workers`).

    Args:
        ray: the module.
        threads: that compute one task.
    """

    def __init__(self, ray: Any, threads: int) -> None:
        self._ray, self.threads = ray, threads
        self._compute = ray.remote(_compute)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        self._nodes = {node["NodeID"]: node["Resources"] for node in nodes}
        self._names = {node["NodeID"]: node["NodeManagerHostname"] for node in nodes}
        self.count = sum(int(found.get(_CPU, 0)) // threads for found in self._nodes.values())
        if not self.count:
            raise UsageError(
                "No machine of the cluster has as many cores as a task has threads.",
                where="--threads",
                observed=threads,
                expected=f"at most {max(int(n.get(_CPU, 0)) for n in self._nodes.values())}",
            )
        self.at_once = _TASKS_A_WORKER * self.count
        self._running: list[Any] = []
        self.tasks, self.largest_bytes, self.seconds = 0, 0, 0.0
        carry_tensors_as_arrays()

    def require_alike(self) -> None:
        """Refuse machines that have other versions; say so where processors differ.

        Raises:
            InputError: another version of this program or of torch, or none.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        own, found = _Machine.here(), {}
        for node in self._nodes:
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            task = self._compute.options(num_cpus=0, num_returns=2, scheduling_strategy=there)
            reference, _ = task.remote(self.threads, 0, _Machine.here, None)
            name = f"{self._names[node]} (node {node[:8]})"
            found[name] = _RayResult(self, reference, name).get()
        for name, other in found.items():
            same = (other.skipcat, other.torch, other.numpy) == (own.skipcat, own.torch, own.numpy)
            if not same:
                raise InputError(
                    "A machine of the cluster has other versions, and would give other bytes.",
                    where=name,
                    observed=f"skipcat {other.skipcat}, torch {other.torch}, numpy {other.numpy}",
                    expected=f"skipcat {own.skipcat}, torch {own.torch}, numpy {own.numpy}",
                )
            if other.processor != own.processor:
                note(f"{name} has another processor than {platform.node()}: last bits may differ")

    def summary(self, dashboard: str | None) -> str:
        """One line for the user: who computes."""
        machines = f"on {len(self._nodes)} machine{'s' * (len(self._nodes) != 1)}"
        threads = f"{self.threads} thread{'s' * (self.threads != 1)} each"
        seen = f"; dashboard: http://{dashboard}" if dashboard else ""
        return f"workers: {self.count} {machines}, {threads}{seen}"

    def submit(
        self, where: str, function: Callable[..., Value], *arguments: Any, needed_bytes: int = 0
    ) -> Result[Value]:
        (result,) = self._begin(where, function, None, arguments, needed_bytes)
        return result

    def submit_parts(
        self,
        where: str,
        function: Callable[..., Sequence[Any]],
        count: int,
        *arguments: Any,
        needed_bytes: int = 0,
    ) -> list[Result[Any]]:
        return self._begin(where, function, count, arguments, needed_bytes)

    def _begin(
        self,
        where: str,
        function: Callable[..., Any],
        count: int | None,
        arguments: Sequence[Any],
        needed_bytes: int,
    ) -> list[Result[Any]]:
        """Submit a task; `count` is of the parts that it returns, None for one whole value."""
        self._require_memory(where, needed_bytes)
        task = self._compute.options(
            num_cpus=self.threads,
            memory=needed_bytes or None,
            max_retries=_TIMES_AGAIN,
            num_returns=(count or 1) + 1,
        )
        given = [a.reference if isinstance(a, _RayResult) else a for a in arguments]
        *values, used = task.remote(self.threads, needed_bytes, function, count, *given)
        self._count_finished()
        self._running.append(used)
        return [_RayResult(self, value, where, needed_bytes) for value in values]

    def share(self, value: Value) -> Result[Value]:
        return _RayResult(self, self._ray.put(value), "what tasks share")

    def _require_memory(self, where: str, needed_bytes: int) -> None:
        """Refuse a task that would wait for ever."""
        most = max(int(found.get(_MEMORY, 0)) for found in self._nodes.values())
        if needed_bytes > most:
            raise ResourceError(
                "No worker has the memory that a task needs.",
                where=where,
                observed=f"{needed_bytes / 1e9:.2f} GB; the largest machine gives "
                f"{most / 1e9:.2f} GB to Ray",
                expected=_EXPECTED_MEMORY,
            )

    def _count_finished(self) -> None:
        """Take note of tasks that ended: their seconds, and the most memory of their processes."""
        if not self._running:
            return
        running = self._running
        ended, self._running = self._ray.wait(running, num_returns=len(running), timeout=0)
        for reference in ended:
            # Of a task that was lost nothing is known; who waits for its result is told.
            with contextlib.suppress(self._ray.exceptions.RayError):
                used = self._ray.get(reference)
                self.tasks += 1
                self.seconds += used.seconds
                self.largest_bytes = max(self.largest_bytes, used.most_bytes)

    def describe(self) -> dict[str, Any]:
        self._count_finished()
        return {
            "workers": self.count,
            "machines": len(self._nodes),
            "threads": self.threads,
            "tasks": self.tasks,
            "task_seconds": round(self.seconds, 1),
            "largest_bytes": self.largest_bytes,
        }


@dataclass(frozen=True)
class _Failed:
    """What a task raised; where it was raised is of no use here."""

    error: Exception


@dataclass(frozen=True)
class _RayResult:
    """What a task will have returned (see `Result`)."""

    workers: _RayWorkers
    reference: Any
    where: str
    needed_bytes: int = 0

    def get(self) -> Any:
        ray = self.workers._ray
        try:
            value = ray.get(self.reference)
        except ray.exceptions.OutOfMemoryError as error:
            raise ResourceError(
                "A machine of the cluster had no memory left, and Ray ended a task, twice.",
                where=self.where,
                observed=str(error).splitlines()[0],
                change="use fewer workers a machine, or machines with more memory",
            ) from error
        except ray.exceptions.RayTaskError as error:
            # Whatever a function raises is a value (`_Failed`): this is of Ray's own.
            raise InputError(
                "A worker cannot run this program.",
                where=self.where,
                observed=str(error).strip().splitlines()[-1],
                expected=f"skipcat {__version__} installed on every machine of the cluster",
            ) from error
        except ray.exceptions.RayError as error:
            raise PipelineError(
                "A worker was lost twice over the same task.",
                where=self.where,
                observed=f"{type(error).__name__}: {str(error).splitlines()[0]}",
                change="look at the machine's memory and at the logs that the dashboard shows; "
                "--resume goes on with what is finished",
            ) from error
        if isinstance(value, _Failed):
            raise self._told(value.error)
        return value

    def _told(self, error: Exception) -> Exception:
        """What a task raised; of memory that it lacked, in the words of this program."""
        shortage = shortage_of(error, self.where)
        if shortage is None or isinstance(error, PipelineError):
            return error
        return ResourceError(
            "A task needed more memory than it may have.",
            where=self.where,
            observed=str(error).splitlines()[0],
            expected=f"{self.needed_bytes / 1e9:.2f} GB beside its arguments, or twice that",
        )


@dataclass(frozen=True)
class _Used:
    """What a task took: the most memory that its process had, and seconds."""

    most_bytes: int
    seconds: float


def _compute(
    threads: int,
    needed_bytes: int,
    function: Callable[..., Any],
    count: int | None,
    *arguments: Any,
) -> tuple[Any, ...]:
    """In a worker: what the function returns, in so many parts, and what it took."""
    carry_tensors_as_arrays()
    with contextlib.suppress(OSError):
        forget_peak()
    started = time.monotonic()
    # A task that another failed fails as that did.
    failed = next((given for given in arguments if isinstance(given, _Failed)), None)
    with limited_threads(threads), _limited_memory(needed_bytes):
        try:
            parts = (failed,) if failed else function(*arguments)
        except Exception as error:
            failed = _Failed(error.with_traceback(None))
    if failed:
        parts = (failed,) * (count or 1)
    elif count is None:
        parts = (parts,)
    return (*parts, _Used(peak_bytes(), time.monotonic() - started))


@contextlib.contextmanager
def _limited_memory(more_bytes: int) -> Iterator[None]:
    """Inside, this process gets little more than so many bytes beyond its own; 0 for no limit."""
    if not more_bytes:
        yield
        return
    import resource

    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    held = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = held + _LENIENCE * more_bytes + _OF_LIBRARIES_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard < 0 else min(wanted, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
