from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pipeline.bench import fits
from pipeline.bench.devices import DEVICES, find_devices
from pipeline.bench.fits import (
    Case,
    DecodeFit,
    Estimate,
    MemoryFit,
    PrefillFit,
    _decode_terms,
    _least_squares,
    _left_out,
)
from pipeline.bench.published import EDGE_LLM, FIGURES, LLAMA_CPP
from pipeline.bench.shape_traffic import traffic_of_shape
from pipeline.bench.shapes import find_shape

KNOWN = DecodeFit(efficiency=0.8, cycles_per_kernel=9000.0)


def test_least_squares_find_the_constants_that_made_the_figures() -> None:
    cases = [case for case in Case.published("decode") if case.device.mode != "7w"]
    terms = [_decode_terms(case) for case in cases]
    seconds = [KNOWN.seconds(case.read_bytes, case.traffic.kernels, case.device) for case in cases]
    inverse, cycles = _least_squares(terms, seconds)
    assert (1 / inverse, cycles) == pytest.approx((0.8, 9000.0))
    assert _left_out([case.figure.shape for case in cases], terms, seconds) < 1e-9


def test_no_constant_is_below_zero() -> None:
    # The second term goes down while the time goes up.
    assert _least_squares([(1, 3), (2, 2), (3, 1)], [1, 2, 3])[1] == pytest.approx(0, abs=1e-9)
    assert min(_least_squares([(1, 3), (2, 2), (3, 1)], [0.5, 2, 4])) >= 0


@pytest.mark.parametrize("engine", [EDGE_LLM, LLAMA_CPP])
def test_the_fitted_constants_are_physical(engine: str) -> None:
    fit = DecodeFit.of(engine)
    assert 0.3 < fit.efficiency < 1
    assert fit.cycles_per_kernel > 0
    assert 0 < fit.slow_share < 1
    assert 0 < PrefillFit.of_edge_llm().efficiency < 1
    assert MemoryFit.of_edge_llm().base.low > 0.5e9


def constants() -> list[object]:
    decoding = [DecodeFit.of(engine) for engine in (EDGE_LLM, LLAMA_CPP)]
    return [*decoding, PrefillFit.of_edge_llm(), MemoryFit.of_edge_llm()]


def test_constants_come_from_the_fitted_figures_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = constants()
    changed = tuple(
        one if one.fitted else replace(one, value=one.value * (3 + n % 5))
        for n, one in enumerate(FIGURES)
    )
    classes = (Case, DecodeFit, PrefillFit, MemoryFit)
    found = [getattr(owner, name) for owner in (fits, *classes) for name in vars(owner)]
    cached = [value for value in found if hasattr(value, "cache_clear")]
    assert len(cached) == 6
    for function in cached:
        function.cache_clear()
    monkeypatch.setattr(fits, "FIGURES", changed)
    after = constants()
    for function in cached:
        function.cache_clear()
    assert before == after


def test_an_interval_is_as_wide_up_as_down_and_never_nothing() -> None:
    found = Estimate.around(10.0, 0.0)
    assert found.low < 10 < found.high
    assert found.low * found.high == pytest.approx(100)
    assert Estimate.around(10.0, 0.3).high > found.high


def test_the_figure_at_7_watts_that_gave_its_bandwidth_is_met() -> None:
    (case,) = [
        case for case in Case.published("decode") if case.device.mode == "7w" and case.figure.fitted
    ]
    fit = DecodeFit.of(LLAMA_CPP)
    seconds = fit.seconds(case.read_bytes, case.traffic.kernels, case.device)
    assert 1 / seconds == pytest.approx(case.figure.value, rel=1e-6)
    unhindered = replace(case.device, mode="")
    assert fit.seconds(1e9, 100, unhindered) < fit.seconds(1e9, 100, case.device)


def test_operations_of_a_prompt_are_two_for_each_weight_and_token_and_those_of_attention() -> None:
    shape = find_shape("qwen3-8b")
    traffic = traffic_of_shape(shape, "int4")
    linears = 8_190_735_360 - 2 * shape.vocab * shape.hidden
    attention = shape.layers * 2 * shape.heads * shape.head_dim * 2048**2
    expected = 2 * linears * 2048 + attention
    assert traffic.prefill_flop(2048) == pytest.approx(expected, rel=1e-3)


def test_no_published_speed_is_above_its_bound() -> None:
    for case in Case.published("decode"):
        bound = case.device.gb_per_s * 1e9 / case.read_bytes
        assert case.figure.value < bound, case.figure


def test_the_orin_nano_of_edge_llm_was_not_in_its_faster_mode() -> None:
    fit, (faster,) = DecodeFit.of(EDGE_LLM), find_devices("orin-nano-8gb@maxn")
    for case in Case.published("decode"):
        if case.figure.engine == EDGE_LLM and case.device == DEVICES["orin-nano-8gb"]:
            seconds = fit.seconds(case.read_bytes, case.traffic.kernels, faster)
            assert math.log(1 / seconds / case.figure.value) > 0.3
