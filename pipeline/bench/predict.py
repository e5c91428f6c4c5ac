"""Decode speed of a device that is not here, from its bandwidth, its clock and published figures.

    bound:     tokens/s = bandwidth / bytes read for a token
    expected:  seconds  = bytes / (efficiency * bandwidth) + cycles * kernels / clock

Efficiency and cycles (what a kernel costs besides the bytes it reads) are the same for every device
and model; they are fitted to published figures by least relative squares. Kernels are the matrix
products, of which a factored layer has more, and five others in a layer.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipeline.bench.shapes import find_shape
from pipeline.bench.targets import BenchTarget
from pipeline.bench.traffic import Traffic
from pipeline.errors import UsageError
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
_ORIN = "NVIDIA Jetson Orin data sheets (LPDDR5; clock of the mode without Super)"
_SUPER = "NVIDIA's Super mode, JetPack 6.1 and later: 68 to 102 GB/s, 625 to 1020 MHz"
_THOR = "NVIDIA Jetson AGX Thor data sheet (LPDDR5X, 273 GB/s)"
_GEFORCE = "NVIDIA's GeForce specifications (memory bus, data rate, boost clock)"


@dataclass(frozen=True)
class _Fit:
    """The two constants.

    Attributes:
        efficiency: share of the peak bandwidth at which a large matrix is read.
        cycles_per_kernel: GPU cycles that a kernel costs besides.
    """

    efficiency: float
    cycles_per_kernel: float

    def seconds(self, read_bytes: float, kernels: int, device: _DeviceSpec) -> float:
        """Expected time of one token."""
        reading = read_bytes / (self.efficiency * device.gb_per_s * 1e9)
        return reading + self.cycles_per_kernel * kernels / (device.ghz * 1e9)


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


def predict(
    targets: Sequence[BenchTarget], devices: Sequence[_DeviceSpec], context: int
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
        "devices": [asdict(device) | {"gb_per_s": device.gb_per_s} for device in devices],
        "check": checked,
        "rows": rows,
    }


def _predict_one(traffic: Traffic, device: _DeviceSpec, context: int, fit: _Fit) -> _Prediction:
    """Bound and expected tokens/s of a model on a device, with `context` tokens in the cache."""
    cache_bytes = traffic.cache_bytes(context)
    read_bytes = traffic.weight_bytes() + cache_bytes
    bound = device.gb_per_s * 1e9 / read_bytes
    expected = 1 / fit.seconds(read_bytes, _kernels_of(traffic), device)
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
    def device(self) -> _DeviceSpec:
        """The one it was published for."""
        return _DEVICES[self.figure.device]


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


@dataclass(frozen=True)
class _DeviceSpec:
    """Memory of a device, whose bandwidth bounds the decoding of one sequence.

    Attributes:
        name: as on the command line.
        bus_bits: width of its memory bus.
        gbit_per_pin: data rate, 10^9 transfers a second.
        ghz: highest clock of its GPU.
        memory_gb: capacity, 10^9 bytes, as it is sold; a Jetson's CPU shares it.
        source: of these numbers.
    """

    name: str
    bus_bits: int
    gbit_per_pin: float
    ghz: float
    memory_gb: int
    source: str

    @property
    def gb_per_s(self) -> float:
        """Peak bandwidth, 10^9 bytes a second."""
        return self.bus_bits * self.gbit_per_pin / 8


_DEVICES = {
    device.name: device
    for device in (
        _DeviceSpec("orin-nano-4gb", 64, 4.266, 0.625, 4, _ORIN),
        _DeviceSpec("orin-nano-8gb", 128, 4.266, 0.625, 8, _ORIN),
        _DeviceSpec("orin-nano-8gb-super", 128, 6.4, 1.02, 8, _SUPER),
        _DeviceSpec("orin-nx-8gb", 128, 6.4, 0.765, 8, _ORIN),
        _DeviceSpec("orin-nx-16gb", 128, 6.4, 0.918, 16, _ORIN),
        _DeviceSpec("agx-orin-32gb", 256, 6.4, 0.93, 32, _ORIN),
        _DeviceSpec("agx-orin-64gb", 256, 6.4, 1.3, 64, _ORIN),
        _DeviceSpec("thor", 256, 8.533, 1.575, 128, _THOR),
        _DeviceSpec("rtx-3060", 192, 15.0, 1.777, 12, _GEFORCE),
        _DeviceSpec("rtx-3090", 384, 19.5, 1.695, 24, _GEFORCE),
        _DeviceSpec("rtx-4060", 128, 17.0, 2.46, 8, _GEFORCE),
        _DeviceSpec("rtx-4070", 192, 21.0, 2.475, 12, _GEFORCE),
        _DeviceSpec("rtx-4080", 256, 22.4, 2.505, 16, _GEFORCE),
        _DeviceSpec("rtx-4090", 384, 21.0, 2.52, 24, _GEFORCE),
        _DeviceSpec("rtx-5070", 192, 28.0, 2.512, 12, _GEFORCE),
        _DeviceSpec("rtx-5080", 256, 30.0, 2.617, 16, _GEFORCE),
        _DeviceSpec("rtx-5090", 512, 28.0, 2.407, 32, _GEFORCE),
    )
}


def find_devices(names: str) -> list[_DeviceSpec]:
    """Devices by their names, separated by commas.

    Raises:
        UsageError: one is not known, or none is named.
    """
    wanted = [name.strip().lower() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in _DEVICES]
    if unknown or not wanted:
        raise UsageError(
            "There is no such device.",
            where="--predict",
            observed=", ".join(unknown) or "none",
            expected=", ".join(_DEVICES),
            change="name one or several of these, separated by commas",
        )
    return [_DEVICES[name] for name in dict.fromkeys(wanted)]
