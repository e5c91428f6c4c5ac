"""Measure models against the memory they are read from, turn by turn, each in its own process."""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.bench.targets import BenchTarget
from pipeline.child_process import ChildEndedError, JsonChild
from pipeline.errors import InputError, PipelineError, ResourceError, UsageError
from pipeline.gpu import find_gpus, read_jetpack
from pipeline.machine import cpu_flags, usable_cores
from pipeline.memory import require_free_memory
from pipeline.progress import note, track
from pipeline.provenance import provenance

_SCHEMA = 1
_WARM_UP_TOKENS = 4
_MEMORY_BUFFER_BYTES = 512 << 20
_Turn = dict[str, Any]
_ERRORS = {error.exit_status: error for error in (UsageError, InputError, ResourceError)}


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        prompt_tokens: read at once.
        new_tokens: fed one by one.
        context: tokens in the cache before the first of them; at least `prompt_tokens`.
        rounds: turns of every model, after one that warms up.
        threads: of PyTorch, of ONNX Runtime, and of the reading of memory.
        device: `auto`, `cpu` or `cuda`.
    """

    prompt_tokens: int
    new_tokens: int
    context: int
    rounds: int
    threads: int
    device: str = "auto"

    @property
    def mean_context(self) -> float:
        """Tokens in the cache at a decode step, on average over the steps."""
        return self.context + (self.new_tokens + 1) / 2

    def asked(self, new_tokens: int) -> dict[str, int]:
        """The request of one turn."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "context": self.context,
            "new_tokens": new_tokens,
        }


def measure(
    targets: Sequence[BenchTarget],
    settings: Settings,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Prefill and decode of every model, interleaved, and the bandwidth of the memory between.

    Args:
        targets: what to measure.
        settings: how.
        tell: takes a line for every turn.

    Returns:
        The record: machine, settings, bandwidth, and a row for each model.

    Raises:
        UsageError: tokens beyond a model's context, or a device that it does not run on.
        InputError: a model does not load, or there is no GPU.
        ResourceError: not enough memory.
    """
    device = _choose_device(targets, settings.device)
    for target in targets:
        target.require_length(settings.context, settings.new_tokens)
    if device == "cpu":
        length = settings.context + settings.new_tokens
        _require_memory(targets, length, _MEMORY_BUFFER_BYTES)
    before = load_average()
    with contextlib.ExitStack() as stack:
        memory_target = {"kind": "memory", "device": device, "threads": settings.threads}
        memory = stack.enter_context(MeasuringChild("memory", memory_target))
        memory.wait_until_open()
        memory.ask()
        children = []
        for target in targets:  # one after the other: then the GPU's memory tells what each took
            note(f"loading {target.label}")
            request = target.request(device, settings.threads)
            child = stack.enter_context(MeasuringChild(target.label, request))
            child.wait_until_open()
            child.ask(**settings.asked(min(_WARM_UP_TOKENS, settings.new_tokens)))
            children.append(child)
        speeds, turns = _take_turns(memory, children, settings, tell)
        bandwidth = {"device": device, **memory.ready, "bytes_per_s": summary(speeds)}
        rows = [
            _row_of(target, child.ready, found, settings, bandwidth["bytes_per_s"]["median"])
            for target, child, found in zip(targets, children, turns, strict=True)
        ]
    return {
        "schema": _SCHEMA,
        "kind": "measurement",
        "machine": describe_machine(),
        "provenance": provenance(),
        "settings": asdict(settings) | {"device": device},
        "load_average": [before, load_average()],
        "bandwidth": bandwidth,
        "rows": rows,
    }


def _take_turns(
    memory: MeasuringChild,
    children: Sequence[MeasuringChild],
    settings: Settings,
    tell: Callable[[str], None],
) -> tuple[list[float], list[list[_Turn]]]:
    """Bytes a second of the memory in each round, and the turns of each child."""
    speeds: list[float] = []
    turns: list[list[_Turn]] = [[] for _ in children]
    for number in track(range(settings.rounds), "rounds"):
        speeds.append(memory.ask()["bytes_per_s"])
        tell(f"round {number + 1}: memory {speeds[-1] / 1e9:.1f} GB/s")
        for child, found in zip(children, turns, strict=True):
            found.append(child.ask(**settings.asked(settings.new_tokens)))
            rate = settings.new_tokens / sum(found[-1]["token_s"])
            tell(f"round {number + 1}: {child.label} {rate:.1f} tokens/s")
    return speeds, turns


def _row_of(
    target: BenchTarget,
    ready: dict[str, Any],
    turns: Sequence[_Turn],
    settings: Settings,
    bytes_per_s: float,
) -> dict[str, Any]:
    """The figures of one model.

    Args:
        target: the model.
        ready: what its process said of it.
        turns: what it measured.
        settings: how.
        bytes_per_s: of the memory.
    """
    widths = ready["float_bytes"]
    weights = target.traffic.weight_bytes(widths["weights"])
    tokens = ready["cache_tokens"] or settings.mean_context
    cache = target.traffic.cache_bytes(tokens, widths["cache"])
    prefill = summary([settings.prompt_tokens / turn["prefill_s"] for turn in turns])
    decode = summary([settings.new_tokens / sum(turn["token_s"]) for turn in turns])
    tokens_s = [second for turn in turns for second in turn["token_s"]]
    achieved = (weights + cache) * decode["median"]
    return {
        "model": target.label,
        **target.public_what,
        "session": ready["session"],
        "prefill_tokens_per_s": prefill,
        "decode_tokens_per_s": decode,
        "token_ms": 1000 * statistics.median(tokens_s),
        "stored_bytes": target.traffic.stored_bytes,
        "weight_bytes_per_token": weights,
        "cache_bytes_per_token": cache,
        "bytes_per_token": weights + cache,
        "bytes_counted_from": target.traffic.counted_from,
        "bytes_per_s": achieved,
        "bandwidth_share": achieved / bytes_per_s,
        "peak_bytes": max(turn["peak_bytes"] for turn in turns),
        "peak_device_bytes": max(turn["peak_device_bytes"] or 0 for turn in turns) or None,
    }


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and all values."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "all": list(values),
    }


def load_average() -> float:
    """Processes that wanted a core over the last minute: above the cores, times are too long."""
    import psutil  # which has it on Windows, too

    return round(psutil.getloadavg()[0], 2)


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory and GPUs of this machine."""
    import psutil

    gpus, why = find_gpus()
    return {
        "cpu": _cpu_name(),
        "cores": usable_cores(),
        "cpu_flags": list(cpu_flags()),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [asdict(gpu) | {"capability": gpu.dotted_capability} for gpu in gpus] or why,
        "jetpack": read_jetpack(),
    }


def _cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, as Linux knows it."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown")


def _choose_device(targets: Sequence[BenchTarget], device: str) -> str:
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


def _require_memory(targets: Sequence[BenchTarget], context: int, others_bytes: int) -> None:
    """Raise ResourceError when the models do not fit into the CPU's free memory together."""
    held = (t.held_bytes() + t.traffic.cache_bytes(context) for t in targets)
    require_free_memory(
        others_bytes + sum(held),
        "Not enough memory for these models side by side.",
        of="needs ",
        change="measure fewer at once, or --predict, which makes no weights",
    )


class MeasuringChild(JsonChild):
    """A process that runs `pipeline.bench.child`.

    Args:
        label: for messages.
        target: what it opens, see `pipeline.bench.child._open_target`.
    """

    def __init__(self, label: str, target: dict[str, Any]) -> None:
        super().__init__([sys.executable, "-m", "pipeline.bench.child"], own_session=True)
        self.label = label
        self.ready: dict[str, Any] = {}
        self.send(target)

    def wait_until_open(self) -> None:
        """Read what the child says of its target into `ready`.

        Raises:
            PipelineError: what it refused the target for, of the child's own class.
        """
        self.ready = self.hear()

    def hear(self) -> dict[str, Any]:
        """The next answer.

        Raises:
            PipelineError: the child's own.
            ResourceError: something killed it.
        """
        try:
            answer = super().hear()
        except ChildEndedError as end:
            raise self._explained(end) from end
        error = answer.get("error")
        if error is not None:
            raise _ERRORS.get(error["status"], PipelineError)(error["what"], **error["details"])
        return answer

    def _explained(self, end: ChildEndedError) -> PipelineError:
        if end.status < 0:
            return ResourceError(
                "A measuring process was killed, most likely for lack of memory.",
                where=self.label,
                observed=end,
                change="measure fewer models at once, or a smaller one",
            )
        return PipelineError(
            "A measuring process ended.", where=self.label, observed=f"{end}; see above"
        )
