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

from pipeline.bench.devices import DEVICES, DeviceSpec
from pipeline.bench.published import FIGURES, Figure
from pipeline.bench.shapes import find_shape
from pipeline.bench.targets import BenchTarget, require_length
from pipeline.bench.traffic import Traffic
from pipeline.provenance import provenance

# Memory that a model may have: the rest is the system's, which on a Jetson is in the same memory.
_USABLE_MEMORY = 0.85
# Two norms, the rotation of queries and keys with the writing of the cache, attention, activation.
_OTHER_KERNELS_OF_A_LAYER = 5


@dataclass(frozen=True)
class _Fit:
    """The two constants.

    Attributes:
        efficiency: share of the peak bandwidth at which a large matrix is read.
        cycles_per_kernel: GPU cycles that a kernel costs besides.
    """

    efficiency: float
    cycles_per_kernel: float

    def seconds(self, read_bytes: float, kernels: int, device: DeviceSpec) -> float:
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
    targets: Sequence[BenchTarget], devices: Sequence[DeviceSpec], context: int
) -> dict[str, Any]:
    """What is expected of every model on every device; the record says that nothing was measured.

    Raises:
        UsageError: tokens beyond a model's context.
    """
    require_length(targets, context, 1)
    fit, checked = _fitted(), _check()
    rows = [
        {"model": target.label}
        | target.what
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


def _predict_one(traffic: Traffic, device: DeviceSpec, context: int, fit: _Fit) -> _Prediction:
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

    figure: Figure
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
    for figure in FIGURES:
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
