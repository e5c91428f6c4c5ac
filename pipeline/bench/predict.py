"""Decode speed of a device that is not here, from its bandwidth, its clock and published figures.

    bound:     tokens/s = 1 / max(bytes read for a token / bandwidth, FLOP of rebuilding / peak)
    expected:  seconds  = bytes / (efficiency * bandwidth) + cycles * kernels / clock + FLOP / peak

Efficiency and cycles (what a kernel costs besides the bytes it reads) are the same for every device
and model; they are fitted to published figures by least relative squares. Kernels are the matrix
products, of which a factored layer has more, and five others in a layer. FLOP are those of keys
that a smaller cache has to rebuild at every step, at a peak that no kernel reaches.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline.bench.devices import DEVICES, DeviceSpec
from pipeline.bench.shapes import find_shape
from pipeline.bench.targets import BenchTarget
from pipeline.bench.traffic import Traffic
from pipeline.provenance import provenance

# Memory that a model may have: the rest is the system's, which on a Jetson is in the same memory.
_USABLE_MEMORY = 0.85
# Two norms, the rotation of queries and keys with the writing of the cache, attention, activation.
_OTHER_KERNELS_OF_A_LAYER = 5
_EDGE_LLM = (
    "TensorRT Edge-LLM 0.9.0, user guide, performance benchmarks: "
    "https://nvidia.github.io/TensorRT-Edge-LLM/0.9.1/user_guide/performance/"
    "performance-benchmarks.html"
)
_MLC = (
    "NVIDIA's blog on the Orin Nano Super, MLC: https://developer.nvidia.com/blog/"
    "nvidia-jetson-orin-nano-developer-kit-gets-a-super-boost/"
)
# Prompt and half of the answer; the pages name no context for these.
_SHORT_CONTEXT = 128


@dataclass(frozen=True)
class _Fit:
    """The two constants.

    Attributes:
        efficiency: share of the peak bandwidth at which a large matrix is read.
        cycles_per_kernel: GPU cycles that a kernel costs besides.
    """

    efficiency: float
    cycles_per_kernel: float

    def seconds(
        self, read_bytes: float, kernels: int, device: DeviceSpec, flop: float = 0.0
    ) -> float:
        """Expected time of one token, with so many operations besides reading."""
        reading = read_bytes / (self.efficiency * device.gb_per_s * 1e9)
        starting = self.cycles_per_kernel * kernels / (device.ghz * 1e9)
        return reading + starting + flop / (device.tflops * 1e12)


@dataclass(frozen=True)
class _Prediction:
    """What is expected of one model on one device. No figure of it was measured.

    Attributes:
        device: name.
        gb_per_s: peak bandwidth of its memory.
        context: tokens in the cache.
        bytes_per_token: that one step reads.
        kernels: that one step is taken to start.
        bound_tokens_per_s: what the bandwidth allows.
        expected_tokens_per_s: what the fit expects.
        efficiency: the one over the other.
        needed_bytes: weights and a cache for the context.
        fits: whether these fit into the memory, with some left for the system.
        rebuild_flop: operations that rebuild keys in one step; 0 where none are.
        rebuild_flop_per_byte: of those, for each byte that is not read since keys are latents; what
            the device has for a byte is `flop_per_byte`. None where none are rebuilt.
        flop_per_byte: peak operations over peak bandwidth.
        rebuilding_pays: whether keys as they are would take longer to read; None as above.
    """

    device: str
    gb_per_s: float
    context: int
    bytes_per_token: int
    kernels: int
    bound_tokens_per_s: float
    expected_tokens_per_s: float
    efficiency: float
    needed_bytes: int
    fits: bool
    rebuild_flop: float
    rebuild_flop_per_byte: float | None
    flop_per_byte: float
    rebuilding_pays: bool | None


def predict(
    targets: Sequence[BenchTarget], devices: Sequence[DeviceSpec], context: int
) -> dict[str, Any]:
    """What is expected of every model on every device; the record says that nothing was measured.

    Raises:
        UsageError: tokens beyond a model's context.
    """
    for target in targets:
        target.require_length(context, 1)
    fit, checked = _fitted(), _check()
    rows = [
        {"model": target.label}
        | target.public_what
        | asdict(_predict_one(target.traffic, device, context, fit))
        | {"published_figures": _checked_against(checked, device.name)}
        for target in targets
        for device in devices
    ]
    return {
        "schema": 1,
        "kind": "prediction",
        "measured": False,
        "context": context,
        "provenance": provenance(),
        "devices": [
            asdict(device) | {"gb_per_s": device.gb_per_s, "tflops": device.tflops}
            for device in devices
        ],
        "check": checked,
        "rows": rows,
    }


def _predict_one(traffic: Traffic, device: DeviceSpec, context: int, fit: _Fit) -> _Prediction:
    """Bound and expected tokens/s of a model on a device, with `context` tokens in the cache."""
    cache_bytes = traffic.cache_bytes(context)
    read_bytes = traffic.weight_bytes() + cache_bytes
    flop, intensity = traffic.rebuild_flop(context), traffic.rebuild_flop_per_byte
    slowest = max(read_bytes / (device.gb_per_s * 1e9), flop / (device.tflops * 1e12))
    bound = 1 / slowest
    expected = 1 / fit.seconds(read_bytes, _kernels_of(traffic), device, flop)
    needed = traffic.stored_bytes + cache_bytes
    return _Prediction(
        device=device.name,
        gb_per_s=round(device.gb_per_s, 1),
        context=context,
        bytes_per_token=read_bytes,
        kernels=_kernels_of(traffic),
        bound_tokens_per_s=bound,
        expected_tokens_per_s=expected,
        efficiency=expected / bound,
        needed_bytes=needed,
        fits=needed <= _USABLE_MEMORY * device.memory_gb * 1e9,
        rebuild_flop=flop,
        rebuild_flop_per_byte=intensity,
        flop_per_byte=round(device.flop_per_byte, 1),
        rebuilding_pays=None if intensity is None else intensity <= device.flop_per_byte,
    )


def _kernels_of(traffic: Traffic) -> int:
    """Kernels of one step: every product, and the others of each layer."""
    return traffic.products + _OTHER_KERNELS_OF_A_LAYER * traffic.layers


@dataclass(frozen=True)
class _Case:
    """A published figure, with what the model reads for a token, and the kernels that do it."""

    figure: _Figure
    read_bytes: int
    kernels: int

    @property
    def device(self) -> DeviceSpec:
        """The one it was published for."""
        return DEVICES[self.figure.device]


@functools.cache
def _published_cases() -> tuple[_Case, ...]:
    """All published figures, their models counted as any other shape is."""
    from pipeline.bench.torch_traffic import traffic_of_shape

    counted: dict[tuple[str, str], Traffic] = {}
    cases = []
    for figure in _FIGURES:
        key = (figure.shape, figure.dtype)
        if key not in counted:
            counted[key] = traffic_of_shape(find_shape(figure.shape), figure.dtype)
        traffic = counted[key]
        read_bytes = traffic.weight_bytes() + traffic.cache_bytes(figure.context)
        cases.append(_Case(figure, read_bytes, _kernels_of(traffic)))
    return tuple(cases)


def _fit_to(cases: Sequence[_Case]) -> _Fit:
    """The constants with the least sum of squared relative errors in time.

    Args:
        cases: of at least two different ratios of bytes to kernels.
    """
    rows = np.array(
        [
            (
                case.read_bytes / (case.device.gb_per_s * 1e9) * case.figure.tokens_per_s,
                case.kernels / (case.device.ghz * 1e9) * case.figure.tokens_per_s,
            )
            for case in cases
        ]
    )
    (inverse_efficiency, cycles), *_ = np.linalg.lstsq(rows, np.ones(len(rows)))
    return _Fit(1 / float(inverse_efficiency), float(cycles))


def _fitted() -> _Fit:
    """The constants that predictions use."""
    return _fit_to([case for case in _published_cases() if case.figure.fitted])


def _error_of(case: _Case, fit: _Fit) -> float:
    """Expected over published tokens/s, less 1."""
    seconds = fit.seconds(case.read_bytes, case.kernels, case.device)
    return 1 / (seconds * case.figure.tokens_per_s) - 1


def _check() -> dict[str, Any]:
    """How well the prediction meets every published figure, for the record.

    For a figure that was fitted, `error_without_device` is of a fit that saw no figure of that
    device: what to expect of a device of which nothing is published.
    """
    cases = _published_cases()
    seen = [case for case in cases if case.figure.fitted]
    fit = _fit_to(seen)
    rows = []
    for case in cases:
        others = [other for other in seen if other.device != case.device]
        error = _error_of(case, fit)
        rows.append(
            asdict(case.figure)
            | {
                "bytes_per_token": case.read_bytes,
                "bound_tokens_per_s": case.device.gb_per_s * 1e9 / case.read_bytes,
                "expected_tokens_per_s": case.figure.tokens_per_s * (1 + error),
                "error": error,
                "error_without_device": _error_of(case, _fit_to(others)),
            }
        )
    return {
        "efficiency": fit.efficiency,
        "cycles_per_kernel": fit.cycles_per_kernel,
        "worst_error_of_fitted": _worst(rows, "error", fitted_ones=True),
        "worst_error_of_others": _worst(rows, "error", fitted_ones=False),
        "worst_error_without_device": _worst(rows, "error_without_device", fitted_ones=True),
        "published": rows,
    }


def _worst(rows: Sequence[dict[str, Any]], key: str, *, fitted_ones: bool) -> float:
    """Largest absolute error of the fitted figures, or of the others."""
    return max(abs(row[key]) for row in rows if row["fitted"] is fitted_ones)


def _checked_against(checked: dict[str, Any], device: str) -> str:
    """How many figures of a device were published, and the largest error of them."""
    errors = [abs(row["error"]) for row in checked["published"] if row["device"] == device]
    return f"{len(errors)}, at most {max(errors):.0%} off" if errors else "none"


@dataclass(frozen=True)
class _Figure:
    """One published decode speed, batch 1.

    Attributes:
        device: a name in DEVICES.
        shape: a name in SHAPES.
        dtype: a name in PRECISIONS.
        context: tokens in the cache.
        tokens_per_s: as published.
        fitted: whether the two constants of the prediction were fitted to it.
        source: where it was published.
    """

    device: str
    shape: str
    dtype: str
    context: int
    tokens_per_s: float
    fitted: bool
    source: str


def _edge_llm(device: str, dtype: str, context: int, speeds: dict[str, float]) -> list[_Figure]:
    return [
        _Figure(device, f"qwen3-{size}", dtype, context, speed, True, _EDGE_LLM)
        for size, speed in speeds.items()
    ]


def _mlc(device: str, speeds: dict[str, float]) -> list[_Figure]:
    return [
        _Figure(device, shape, "q4f16", _SHORT_CONTEXT, speed, False, _MLC)
        for shape, speed in speeds.items()
    ]


# The page does not say in which mode the Orin Nano ran. From its one figure to the other, each
# further byte takes as long as at 62 GB/s: 91% of 68, or 61% of the 102 of Super mode, where it is
# 83% on the AGX and 95% on the NX. It is taken for the former.
_FIGURES = (
    *_edge_llm(
        "agx-orin-64gb",
        "int4",
        _SHORT_CONTEXT,
        {"0.6b": 186.4, "1.7b": 98.6, "4b": 53.1, "8b": 32.5},
    ),
    *_edge_llm(
        "orin-nx-16gb",
        "int4",
        _SHORT_CONTEXT,
        {"0.6b": 117.4, "1.7b": 60.4, "4b": 31.6, "8b": 19.0},
    ),
    *_edge_llm("orin-nano-8gb", "int4", _SHORT_CONTEXT, {"0.6b": 72.8, "1.7b": 37.4}),
    *_edge_llm("thor", "nvfp4", 2048, {"0.6b": 245.4, "1.7b": 135.5, "4b": 73.7, "8b": 44.4}),
    *_mlc("orin-nano-8gb", {"llama-3.2-3b": 27.7, "llama-3.1-8b": 14.0}),
    *_mlc("orin-nano-8gb-super", {"llama-3.2-3b": 43.07, "llama-3.1-8b": 19.14}),
)
