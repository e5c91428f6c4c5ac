"""The constants of predictions, fitted to published figures, and how far off they are.

Every constant is found by least relative squares, and none is below zero. How far a prediction may
be off is judged by leaving out one model at a time, and one device at a time: what the others say
of it is a prediction too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.bench.devices import DeviceSpec, find_devices
from pipeline.bench.published import EDGE_LLM, FIGURES, LLAMA_CPP, Figure, Kind
from pipeline.bench.shape_traffic import traffic_of_shape
from pipeline.bench.shapes import find_shape
from pipeline.bench.traffic import Traffic

# Of a normal distribution, 80% lie within so many standard deviations.
_SIGMAS_OF_80 = 1.2816
# By how much boards of one name, versions of one engine and runs differ, besides.
_OF_BOARDS = 0.05
# In this mode memory is slower than its own clock says; by how much is fitted to one figure.
_SLOW_MODE = "7w"


@dataclass(frozen=True)
class Estimate:
    """A number with the ends of its interval, which is meant to hold 80%."""

    expected: float
    low: float
    high: float

    @staticmethod
    def around(expected: float, spread: float) -> Estimate:
        """By a standard deviation of the logarithm."""
        factor = math.exp(_SIGMAS_OF_80 * math.hypot(spread, _OF_BOARDS))
        return Estimate(expected, expected / factor, expected * factor)


@dataclass(frozen=True)
class Case:
    """A published figure, its model counted as any other shape is."""

    figure: Figure
    traffic: Traffic
    device: DeviceSpec

    @property
    def read_bytes(self) -> int:
        """What a token of it reads."""
        return self.traffic.weight_bytes() + self.traffic.cache_bytes(self.figure.tokens)

    @staticmethod
    @functools.cache
    def published(kind: Kind) -> tuple[Case, ...]:
        """All published figures of a kind."""
        counted: dict[tuple[str, str], Traffic] = {}
        cases = []
        for figure in FIGURES:
            if figure.kind != kind:
                continue
            key = (figure.shape, figure.dtype)
            if key not in counted:
                counted[key] = traffic_of_shape(find_shape(figure.shape), figure.dtype)
            (device,) = find_devices(figure.device)
            cases.append(Case(figure, counted[key], device))
        return tuple(cases)


# --- decoding ---


@dataclass(frozen=True)
class DecodeFit:
    """What one token takes in one engine.

    Attributes:
        efficiency: share of the peak bandwidth at which a large matrix is read.
        cycles_per_kernel: GPU cycles that a kernel costs besides.
        spread: typical error of the logarithm, of models or devices that were left out.
        slow_share: of the bandwidth that is left in the slowest power mode.
    """

    efficiency: float
    cycles_per_kernel: float
    spread: float = 0.0
    slow_share: float = 1.0

    @staticmethod
    @functools.cache
    def of(engine: str) -> DecodeFit:
        """The constants of an engine; figures in the slowest mode give that mode's bandwidth."""
        cases = [case for case in _fitted("decode", engine) if case.device.mode != _SLOW_MODE]
        terms = [_decode_terms(case) for case in cases]
        seconds = [1 / case.figure.value for case in cases]
        inverse_efficiency, cycles = _least_squares(terms, seconds)
        spread = _spread_of(cases, terms, seconds)
        return DecodeFit(1 / inverse_efficiency, cycles, spread, _slow_share())

    def seconds(
        self, read_bytes: float, kernels: int, device: DeviceSpec, flop: float = 0.0
    ) -> float:
        """Expected time of one token, with so many operations besides reading."""
        share = self.slow_share if device.mode == _SLOW_MODE else 1.0
        reading = read_bytes / (self.efficiency * share * device.gb_per_s * 1e9)
        starting = self.cycles_per_kernel * kernels / (device.ghz * 1e9)
        return reading + starting + flop / (device.tflops * 1e12)


def _decode_terms(case: Case) -> tuple[float, float]:
    """Seconds at the peak bandwidth, and seconds of a cycle for each kernel."""
    reading = case.read_bytes / (case.device.gb_per_s * 1e9)
    return reading, case.traffic.kernels / (case.device.ghz * 1e9)


@functools.cache
def _slow_share() -> float:
    """Bandwidth of the slowest power mode, as a share of what its clock gives."""
    cases = [case for case in _fitted("decode", LLAMA_CPP) if case.device.mode != _SLOW_MODE]
    known = _least_squares(
        [_decode_terms(case) for case in cases], [1 / case.figure.value for case in cases]
    )
    shares = []
    for case in _fitted("decode", LLAMA_CPP):
        if case.device.mode == _SLOW_MODE:
            reading, starting = _decode_terms(case)
            left = 1 / case.figure.value - known[1] * starting
            shares.append(known[0] * reading / left)
    return float(np.mean(shares))


# --- prompts, memory, power ---


@dataclass(frozen=True)
class PrefillFit:
    """What a prompt takes besides one step: operations at a share of the peak, and memory.

    Attributes:
        efficiency: share of the peak of the matrix units.
        bytes_per_flop: that are read besides, at the peak bandwidth.
        spread: as of `DecodeFit`.
    """

    efficiency: float
    bytes_per_flop: float
    spread: float

    @staticmethod
    @functools.cache
    def of_edge_llm() -> PrefillFit:
        """On Orin, the only figures there are."""
        cases = _fitted("prefill", EDGE_LLM)
        terms, seconds = [], []
        for case in cases:
            flop = case.traffic.prefill_flop(case.figure.tokens)
            terms.append((flop / (case.device.tflops * 1e12), flop / (case.device.gb_per_s * 1e9)))
            seconds.append(case.figure.value / 1e3 - _step_seconds(case.traffic, case.device))
        inverse_efficiency, bytes_per_flop = _least_squares(terms, seconds)
        return PrefillFit(1 / inverse_efficiency, bytes_per_flop, _spread_of(cases, terms, seconds))

    def prompt_ms(self, traffic: Traffic, tokens: int, device: DeviceSpec) -> Estimate:
        """What a prompt takes: a step that reads weights, and its operations."""
        flop = traffic.prefill_flop(tokens)
        reading = self.bytes_per_flop * flop / (device.gb_per_s * 1e9)
        own = flop / (self.efficiency * device.tflops * 1e12) + reading
        return Estimate.around(1e3 * (_step_seconds(traffic, device) + own), self.spread)


def _step_seconds(traffic: Traffic, device: DeviceSpec) -> float:
    return DecodeFit.of(EDGE_LLM).seconds(traffic.weight_bytes(), traffic.kernels, device)


@dataclass(frozen=True)
class MemoryFit:
    """GPU memory of an engine.

    Attributes:
        base: bytes beyond weights, with a tied embedding twice, and the cache.
        spread: typical error of the logarithm.
    """

    base: Estimate
    spread: float

    @staticmethod
    @functools.cache
    def of_edge_llm() -> MemoryFit:
        """By all its figures."""
        cases = _fitted("memory", EDGE_LLM)
        own = [_edge_bytes(case.traffic, case.figure.tokens) for case in cases]
        extra = [case.figure.value - held for case, held in zip(cases, own, strict=True)]
        base = Estimate(float(np.mean(extra)), min(extra), max(extra))
        logs = [
            math.log(case.figure.value / (held + base.expected))
            for case, held in zip(cases, own, strict=True)
        ]
        return MemoryFit(base, float(np.sqrt(np.mean(np.square(logs)))))

    def run_bytes(self, traffic: Traffic, tokens: int) -> Estimate:
        """GPU memory that running takes."""
        return Estimate.around(_edge_bytes(traffic, tokens) + self.base.expected, self.spread)


def _edge_bytes(traffic: Traffic, tokens: int) -> int:
    """Weights and cache of Edge-LLM, which keeps the embedding beside a head that is the same."""
    twice = max((t.elements * t.bits for t in traffic.tensors if t.product), default=0) / 8
    tied = not any(tensor.looked_up for tensor in traffic.tensors)
    return traffic.stored_bytes + traffic.cache_bytes(tokens) + (int(twice) if tied else 0)


@dataclass(frozen=True)
class _WattsFit:
    """Power of CPU and GPU while a token is decoded, which grows with the clock.

    Attributes:
        watts_per_ghz: of a GPU of 8 multiprocessors.
        spread: as of `DecodeFit`.
    """

    watts_per_ghz: float
    spread: float


@functools.cache
def _watts_fit() -> _WattsFit:
    cases = _fitted("energy", LLAMA_CPP)
    joules = [case.figure.value for case in cases]
    speeds = {_place(case.figure): case.figure.value for case in Case.published("decode")}
    terms = [(case.device.ghz / speeds[_place(case.figure)], 0.0) for case in cases]
    watts, _ = _least_squares(terms, joules)
    return _WattsFit(watts, _spread_of(cases, terms, joules))


def _place(figure: Figure) -> tuple[str, str, str]:
    return figure.engine, figure.device, figure.shape


def joules_per_token(tokens_per_s: Estimate, device: DeviceSpec) -> Estimate:
    """Energy of CPU and GPU for a token, of which speed and power are both uncertain."""
    fit = _watts_fit()
    speed = math.log(tokens_per_s.high / tokens_per_s.low) / (2 * _SIGMAS_OF_80)
    watts = fit.watts_per_ghz * device.ghz
    return Estimate.around(watts / tokens_per_s.expected, math.hypot(fit.spread, speed))


# --- fitting ---


def _fitted(kind: Kind, engine: str) -> list[Case]:
    return [c for c in Case.published(kind) if c.figure.fitted and c.figure.engine == engine]


def _least_squares(
    terms: Sequence[tuple[float, float]], values: Sequence[float]
) -> tuple[float, float]:
    """Factors of two terms with the least sum of squared relative errors; neither is below 0."""
    rows = np.array(terms) / np.array(values)[:, None]
    used = [column for column in (0, 1) if rows[:, column].any()]
    while True:
        found, *_ = np.linalg.lstsq(rows[:, used], np.ones(len(rows)))
        if (found >= 0).all():
            break
        used = [column for column, factor in zip(used, found, strict=True) if factor > 0]
    factors = dict(zip(used, map(float, found), strict=True))
    return factors.get(0, 0.0), factors.get(1, 0.0)


def _spread_of(
    cases: Sequence[Case], terms: Sequence[tuple[float, float]], values: Sequence[float]
) -> float:
    """Typical logarithm of the error of a model, or of a device, that the others predict."""
    groupings: tuple[Callable[[Case], str], ...] = (
        lambda case: case.figure.shape,
        lambda case: case.figure.device,
    )
    return max(_left_out(list(map(key, cases)), terms, values) for key in groupings)


def _left_out(
    groups: Sequence[str], terms: Sequence[tuple[float, float]], values: Sequence[float]
) -> float:
    """Mean over groups of the root mean square of their errors when they are left out."""
    found = []
    for group in set(groups):
        rest = [n for n, name in enumerate(groups) if name != group]
        factors = _least_squares([terms[n] for n in rest], [values[n] for n in rest])
        left = [n for n, name in enumerate(groups) if name == group]
        logs = [math.log(float(np.dot(factors, terms[n])) / values[n]) for n in left]
        found.append(math.sqrt(float(np.mean(np.square(logs)))))
    return sum(found) / len(found)
