from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.bench.devices import DEVICES, find_devices
from pipeline.bench.predict import (
    _FIGURES,
    _Case,
    _check,
    _error_of,
    _Fit,
    _fit_to,
    _fitted,
    _kernels_of,
    _predict_one,
    _published_cases,
)
from pipeline.bench.shapes import _SHAPES
from pipeline.bench.torch_traffic import traffic_of_shape
from pipeline.bench.traffic import RebuiltKeys
from pipeline.errors import UsageError

KNOWN = _Fit(efficiency=0.8, cycles_per_kernel=9000.0)
PUBLISHED_GB_PER_S = {
    "orin-nano-4gb": 34,
    "orin-nano-8gb": 68,
    "orin-nano-8gb-super": 102,
    "orin-nx-16gb": 102.4,
    "agx-orin-64gb": 204.8,
    "thor": 273,
    "rtx-3090": 936,
    "rtx-4090": 1008,
    "rtx-5090": 1792,
}


@pytest.mark.parametrize(
    ("name", "gigabytes"), [("qwen3-0.6b", 0.54), ("qwen3-1.7b", 1.35), ("qwen3-8b", 4.83)]
)
def test_bytes_of_an_int4_model_are_those_of_the_survey(name: str, gigabytes: float) -> None:
    # Linears of 4.125 bits and a float16 head, worked out by hand before this was written.
    read = traffic_of_shape(_SHAPES[name], "int4").weight_bytes()
    assert read / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_float16_bytes_are_two_for_every_parameter_but_the_embedding() -> None:
    shape = _SHAPES["qwen3-8b"]
    parameters = 8_190_735_360 - (shape.vocab - 1) * shape.hidden
    assert traffic_of_shape(shape, "float16").weight_bytes() == 2 * parameters


def test_the_fit_finds_the_constants_that_made_the_figures() -> None:
    cases = []
    for case in _published_cases():
        seconds = KNOWN.seconds(case.read_bytes, case.kernels, case.device)
        cases.append(replace(case, figure=replace(case.figure, tokens_per_s=1 / seconds)))
    found = _fit_to(cases)
    assert found.efficiency == pytest.approx(KNOWN.efficiency)
    assert found.cycles_per_kernel == pytest.approx(KNOWN.cycles_per_kernel)
    assert max(abs(_error_of(case, found)) for case in cases) < 1e-9


def test_the_constants_are_physical() -> None:
    fit = _fitted()
    assert 0.5 < fit.efficiency < 1
    assert fit.cycles_per_kernel > 0


def test_published_figures_are_met_as_well_as_the_documentation_says() -> None:
    record = _check()
    assert record["worst_error_of_fitted"] < 0.145
    assert record["worst_error_without_device"] < 0.20
    assert record["worst_error_of_others"] < 0.11
    assert len(record["published"]) == len(_FIGURES)


def test_no_published_figure_is_above_its_bound() -> None:
    for row in _check()["published"]:
        assert row["tokens_per_s"] < row["bound_tokens_per_s"]


def test_the_orin_nano_was_not_in_its_faster_mode() -> None:
    cases = [case for case in _published_cases() if case.figure.device == "orin-nano-8gb"]
    faster = [replace(case.figure, device="orin-nano-8gb-super") for case in cases]
    fit = _fitted()
    for case, figure in zip(cases, faster, strict=True):
        slower_error = _error_of(case, fit)
        assert (
            _error_of(_Case(figure, case.read_bytes, case.kernels), fit) > 0.3 > abs(slower_error)
        )


def test_compression_raises_the_bound_by_the_ratio_of_the_bytes_and_starts_more_kernels() -> None:
    device, fit = DEVICES["orin-nx-16gb"], _fitted()
    dense, kept = (traffic_of_shape(_SHAPES["llama-3.2-1b"], "float16", k) for k in (1.0, 0.6))
    before, after = (_predict_one(traffic, device, 1024, fit) for traffic in (dense, kept))
    ratio = before.bytes_per_token / after.bytes_per_token
    assert after.bound_tokens_per_s == pytest.approx(before.bound_tokens_per_s * ratio)
    gain = after.expected_tokens_per_s / before.expected_tokens_per_s
    assert 1 < gain < ratio
    # q, k, v and gate, up share a factor each: four more products in each of 16 layers.
    assert _kernels_of(kept) - _kernels_of(dense) == 4 * 16


def test_expected_is_below_the_bound_and_a_model_beyond_the_memory_does_not_fit() -> None:
    traffic = traffic_of_shape(_SHAPES["llama-3.1-70b"], "int4")
    nano, thor = (
        _predict_one(traffic, DEVICES[d], 128, _fitted()) for d in ("orin-nano-8gb", "thor")
    )
    assert (nano.fits, thor.fits) == (False, True)
    for prediction in (nano, thor):
        assert prediction.expected_tokens_per_s < prediction.bound_tokens_per_s
        assert prediction.efficiency == pytest.approx(
            prediction.expected_tokens_per_s / prediction.bound_tokens_per_s
        )


def test_a_longer_context_is_slower() -> None:
    traffic, device = traffic_of_shape(_SHAPES["qwen3-0.6b"], "int4"), DEVICES["thor"]
    rates = [_predict_one(traffic, device, n, _fitted()).expected_tokens_per_s for n in (128, 4096)]
    assert rates[1] < rates[0]


# Of dense float16: what is published of sparse int8 over 4, of sparse fp4 over 8, or itself.
PUBLISHED_TFLOPS = {
    "orin-nano-4gb": 20 / 4, "orin-nano-8gb": 40 / 4, "orin-nano-8gb-super": 67 / 4,
    "agx-orin-64gb": 170 / 4, "thor": 2070 / 8, "rtx-3090": 71, "rtx-4090": 165.2,
    "rtx-5090": 209.5,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED_TFLOPS)
def test_multiprocessors_times_clock_is_the_published_peak(name: str) -> None:
    assert DEVICES[name].tflops == pytest.approx(PUBLISHED_TFLOPS[name], rel=0.025)


def test_rebuilding_half_the_keys_takes_as_many_operations_a_byte_as_a_group_has_numbers() -> None:
    # 2 rank n FLOP for 2 (n - groups rank) bytes of float16, with half of the rank: n a group.
    for groups in (1, 8):
        numbers = 8 // groups * 128
        own = RebuiltKeys.of((groups, 8 // groups, numbers // 2, 128), 2 * 8 * 64, 2)
        dense = traffic_of_shape(_SHAPES["qwen3-8b"], "float16")
        assert replace(dense, rebuilt=[own] * 36).rebuild_flop_per_byte == numbers


def test_rebuilt_keys_cost_their_operations_and_pay_where_a_device_has_them() -> None:
    dense = traffic_of_shape(_SHAPES["qwen3-8b"], "int4")
    keys = RebuiltKeys.of((1, 8, 512, 128), 1024, 2)
    latent = replace(
        dense,
        cache=[replace(t, width=512) if n % 2 == 0 else t for n, t in enumerate(dense.cache)],
        rebuilt=[keys] * 36,
    )
    device, fit = DEVICES["agx-orin-64gb"], _fitted()
    before, after = (_predict_one(traffic, device, 32768, fit) for traffic in (dense, latent))
    assert after.rebuild_flop == pytest.approx(36 * 32768 * 2 * 512 * 1024)
    assert after.bytes_per_token < before.bytes_per_token
    assert after.expected_tokens_per_s < before.expected_tokens_per_s
    assert (before.rebuilding_pays, after.rebuilding_pays) == (None, False)
    by_head = replace(latent, rebuilt=[RebuiltKeys.of((8, 1, 64, 128), 1024, 2)] * 36)
    assert _predict_one(by_head, device, 32768, fit).rebuilding_pays
    for prediction in (before, after):
        assert prediction.expected_tokens_per_s < prediction.bound_tokens_per_s


@pytest.mark.parametrize("name", PUBLISHED_GB_PER_S)
def test_bus_width_times_data_rate_is_the_published_bandwidth(name: str) -> None:
    assert DEVICES[name].gb_per_s == pytest.approx(PUBLISHED_GB_PER_S[name], rel=0.006)


def test_devices_are_found_once_each_in_the_order_given() -> None:
    found = find_devices("thor, RTX-4090,thor,")
    assert [device.name for device in found] == ["thor", "rtx-4090"]


@pytest.mark.parametrize("names", ["tpu-v9", "", "thor,tpu-v9"])
def test_an_unknown_device_is_refused_with_the_known_ones(names: str) -> None:
    with pytest.raises(UsageError) as refused:
        find_devices(names)
    for name in DEVICES:
        assert name in str(refused.value)
