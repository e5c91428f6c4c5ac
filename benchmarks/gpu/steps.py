"""The steps of the GPU command, what is worth most first, and what a step is given and says.

A step is a function of another module that yields rows; it is imported where it runs, in a child.
"""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import dataclass, field
from typing import Any

# A named row: what it is of, and its numbers.
Row = tuple[str, dict[str, Any]]
_H200_BYTES_PER_S = 4.3e12  # a device copy, read and written bytes


@dataclass(frozen=True)
class Setting:
    """What a step is given.

    Attributes:
        device: `cuda`, or `cpu`, where layers are tiny, kernels emulated, and times mean nothing.
        seed: of all data, fresh in every run.
        bytes_per_s: a copy within the device's memory, read and written bytes, of the same run.
        done: names of rows that are there already.
        seconds: that the step may take.
        started: when it began, on the monotonic clock.
    """

    device: str
    seed: int
    bytes_per_s: float = _H200_BYTES_PER_S
    done: frozenset[str] = frozenset()
    seconds: float = 600.0
    started: float = field(default_factory=time.monotonic)

    @property
    def on_gpu(self) -> bool:
        """Whether times mean something."""
        return self.device == "cuda"

    @property
    def left_s(self) -> float:
        """Seconds until the step is ended from outside."""
        return self.seconds - (time.monotonic() - self.started)


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: in the file of results.
        rows: the function that yields its rows, as `module:function`.
        most_s: seconds after which it is ended; its rows until then count.
        least_s: with less time left it is not begun.
    """

    name: str
    rows: str
    most_s: float
    least_s: float = 15.0


_LAYERS, _MODELS, _CHECKS, _CACHES, _OFFLOAD = (
    f"benchmarks.gpu.{name}"
    for name in ("layer_steps", "model_steps", "check_steps", "cache_steps", "offload_steps")
)
# Seconds are for a card that is at hand for ten minutes. Later steps get what earlier ones leave.
STEPS = (
    Step("card", f"{_LAYERS}:card", 240),  # most of it nvcc, where nothing was prepared
    Step("errors", f"{_LAYERS}:errors", 45),
    Step("decode layers", f"{_LAYERS}:decode_layers", 75),
    Step("decode 8B", f"{_MODELS}:decode_8b", 90),
    Step("prefill layers", f"{_LAYERS}:prefill_layers", 30),
    Step("memcheck", f"{_CHECKS}:memcheck", 75),
    Step("racecheck", f"{_CHECKS}:racecheck", 60),
    Step("latent attention", f"{_CACHES}:latent_attention", 60),
    Step("int4 rivals", f"{_LAYERS}:int4_rivals", 60),
    Step("offload", f"{_OFFLOAD}:offload", 120),
    Step("decode default model", f"{_MODELS}:decode_default", 60),
    Step("decode 1B", f"{_MODELS}:decode_1b", 60),
    Step("plugin harness", f"{_CHECKS}:harness", 60),
    Step("sessions", f"{_MODELS}:sessions", 90),
    Step("gpu tests", f"{_CHECKS}:gpu_tests", 120),
)


def verdict(claim: str, observed: float, least: float, judged: bool = True) -> dict[str, Any]:
    """One claim beside what it asks; NaN misses.

    Args:
        claim: what `observed` is, which should be at least `least`.
        observed: a ratio of one run.
        least: what is asked.
        judged: whether the row is one that the claim is about.
    """
    passed = "pass" if observed >= least else "missed"
    outcome = passed if judged else "not judged"
    return {"claim": claim, "observed": observed, "least": least, "verdict": outcome}


def within(claim: str, observed: float, most: float) -> dict[str, Any]:
    """One claim that asks for at most so much; NaN misses."""
    passed = "pass" if observed <= most else "missed"
    return {"claim": claim, "observed": observed, "most": most, "verdict": passed}


def outcome(claim: str, passed: bool, **more: Any) -> dict[str, Any]:
    """One claim that holds or does not."""
    return {"claim": claim, "verdict": "pass" if passed else "missed", **more}


def not_run(claim: str, why: str) -> dict[str, Any]:
    """One claim that could not be looked at."""
    return {"claim": claim, "verdict": "not run", "why": why}


def let_go() -> None:
    """Give back the device's memory, and what torch.compile remembers, if there is any."""
    torch = sys.modules.get("torch")
    if torch is None:
        return
    # Captured graphs hold memory, and a function is compiled 8 times at most.
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
