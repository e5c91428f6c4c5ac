"""What is to be measured or predicted: folders and shapes, checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.bench.traffic import Traffic
from pipeline.errors import InputError, ResourceError, UsageError

# What PyTorch holds a checkpoint in on the CPU, and what ONNX Runtime widens float16 to.
_CPU_FLOAT_BYTES = 4
_GIGABYTE = 1e9


@dataclass(frozen=True)
class BenchTarget:
    """One model.

    Attributes:
        label: of its row.
        library: `torch`, `onnx` or `tensorrt`.
        what: `folder`, or `shape`, `dtype` and `kept`; as the child process is told.
        traffic: what it reads for a token.
    """

    label: str
    library: str
    what: dict[str, Any]
    traffic: Traffic

    def request(self, device: str, threads: int) -> dict[str, Any]:
        """What the child process is told to open."""
        kind = "shape" if "shape" in self.what else "folder"
        place = {"kind": kind, "library": self.library, "device": device, "threads": threads}
        return place | self.what

    def held_bytes(self) -> int:
        """Weights in the memory of the CPU."""
        return self.traffic.held_bytes(None if "shape" in self.what else _CPU_FLOAT_BYTES)


def folder_target(folder: Path) -> BenchTarget:
    """A checkpoint, an ONNX export or an engine.

    Raises:
        InputError: the folder is none of them, or its files are broken.
    """
    from pipeline.runtime.sessions.open_session import folder_kind

    if not folder.is_dir():
        raise InputError("There is no such folder.", where=folder)
    path = folder.resolve()
    what = {"folder": str(path)}
    label = "/".join(path.parts[-2:]).lstrip("/")
    return BenchTarget(label, folder_kind(path), what, traffic_of_folder(path))


def traffic_of_folder(folder: Path) -> Traffic:
    """Count what a checkpoint, an ONNX export or an engine reads, from its own files.

    Raises:
        pipeline.errors.InputError: the folder is none of them, or its files are broken.
    """
    from pipeline.runtime.sessions.open_session import folder_kind

    kind = folder_kind(folder)
    if kind == "torch":
        from pipeline.bench.torch_traffic import traffic_of_checkpoint

        return traffic_of_checkpoint(folder)
    from pipeline.bench import onnx_traffic

    if kind == "onnx":
        return onnx_traffic.traffic_of_export(folder)
    return onnx_traffic.traffic_of_engine(folder)


def shape_targets(name: str, dtype: str, kept: Sequence[float]) -> list[BenchTarget]:
    """An architecture, dense for a kept fraction of 1 and with factors for others.

    Raises:
        UsageError: there is no such shape, or a fraction is outside (0, 1].
    """
    from pipeline.bench.shapes import find_shape
    from pipeline.bench.torch_traffic import traffic_of_shape

    shape = find_shape(name)
    targets = []
    for fraction in kept:
        label = f"{name} {dtype}" + (f" keep {fraction:g}" if fraction != 1 else " dense")
        what = {"shape": name, "dtype": dtype, "kept": fraction}
        targets.append(BenchTarget(label, "torch", what, traffic_of_shape(shape, dtype, fraction)))
    return targets


def require_length(targets: Sequence[BenchTarget], context: int, new_tokens: int) -> None:
    """Raise UsageError when a model cannot hold so many tokens."""
    for target in targets:
        longest = target.traffic.max_length
        if longest is not None and context + new_tokens > longest:
            raise UsageError(
                "The tokens do not fit into the model's context.",
                where=target.label,
                observed=f"{context} + {new_tokens} tokens",
                expected=f"at most {longest}",
                change="lower --prompt-tokens, --context or --new-tokens",
            )


def choose_device(targets: Sequence[BenchTarget], device: str) -> str:
    """`cpu` or `cuda`; `auto` is the GPU for engines, and the CPU for all else.

    Raises:
        UsageError: a model that does not run there.
        InputError: PyTorch sees no GPU.
    """
    engines = [target.label for target in targets if target.library == "tensorrt"]
    exports = [target.label for target in targets if target.library == "onnx"]
    chosen = ("cuda" if engines else "cpu") if device == "auto" else device
    wrong = exports if chosen == "cuda" else engines
    if wrong:
        library = "ONNX Runtime runs on the CPU" if chosen == "cuda" else "An engine runs on a GPU"
        raise UsageError(
            f"{library} here.",
            where=wrong[0],
            observed=f"device {chosen}",
            change="measure it in a run of its own, with the other --device",
        )
    if chosen == "cuda":
        _require_cuda()
    return chosen


def _require_cuda() -> None:
    """Raise InputError when PyTorch sees no GPU."""
    import torch

    if not torch.cuda.is_available():
        raise InputError(
            "PyTorch cannot use a GPU on this machine.",
            observed=f"torch {torch.__version__}",
            change="pass --device cpu, or --predict a device",
        )


def require_memory(targets: Sequence[BenchTarget], context: int, others_bytes: int) -> None:
    """Raise ResourceError when the models do not fit into the CPU's free memory together."""
    import psutil

    needed = others_bytes
    for target in targets:
        needed += target.held_bytes() + target.traffic.cache_bytes(context)
    free = psutil.virtual_memory().available
    if needed > free:
        raise ResourceError(
            "Not enough memory for these models side by side.",
            observed=f"needs {needed / _GIGABYTE:.1f} GB, {free / _GIGABYTE:.1f} GB are free",
            change="measure fewer at once, or --predict, which makes no weights",
        )
