"""Tasks for workers: functions of a module, as tasks have to be."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch

from pipeline.errors import InputError

__all__ = ["die", "die_once", "fail", "fill", "name_types", "own_process", "threads", "wait_long"]


def own_process(*_: object) -> int:
    """Which process computes."""
    return os.getpid()


def threads() -> tuple[int, str | None]:
    """How many of PyTorch's compute, and what the environment says."""
    return torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")


def name_types(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[str, torch.Tensor]]:
    """The type of every tensor as it arrived, and the tensor."""
    return {name: (str(tensor.dtype), tensor) for name, tensor in tensors.items()}


def fail(kind: type[Exception]) -> None:
    """Raise, as a function that is given what it cannot use."""
    if kind is InputError:
        raise InputError("A group of matrices cannot be factored.", where="layer 3")
    raise kind("of no use")


def fill(count_bytes: int) -> int:
    """Take and touch memory."""
    return int(torch.ones(count_bytes // 8, dtype=torch.float64).sum())


def die() -> None:
    """End this process, as the kernel does where memory lacks."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(mark: str) -> int:
    """End this process the first time, and return its number after that."""
    path = Path(mark)
    if not path.exists():
        path.touch()
        die()
    return os.getpid()


def wait_long(mark: str) -> None:
    """Say that it began, and take an hour."""
    Path(mark).touch()
    time.sleep(3600)
