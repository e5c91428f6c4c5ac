from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.bench.devices import DEVICES, DeviceSpec, find_devices
from pipeline.bench.fits import DecodeFit
from pipeline.bench.judge import judged_figures
from pipeline.bench.predict import (
    OURS,
    _predict_one,
    _Prediction,
    _published_of,
    predict,
    require_a_fit,
)
from pipeline.bench.published import EDGE_LLM, LLAMA_CPP
from pipeline.bench.shape_traffic import traffic_of_shape
from pipeline.bench.shapes import _SHAPES
from pipeline.bench.targets import BenchTarget
from pipeline.bench.traffic import RebuiltKeys, Traffic
from pipeline.errors import ResourceError, UsageError

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


def predicted(
    traffic: Traffic, device: str | DeviceSpec, context: int, engine: str = EDGE_LLM
) -> _Prediction:
    (spec,) = find_devices(device) if isinstance(device, str) else (device,)
    return _predict_one(traffic, spec, context, engine)


def test_compression_raises_the_bound_by_the_ratio_of_the_bytes_and_starts_more_kernels() -> None:
    dense, kept = (traffic_of_shape(_SHAPES["llama-3.2-1b"], "float16", k) for k in (1.0, 0.6))
    before, after = (predicted(traffic, "orin-nx-16gb", 1024) for traffic in (dense, kept))
    ratio = before.bytes_per_token / after.bytes_per_token
    assert after.bound_tokens_per_s == pytest.approx(before.bound_tokens_per_s * ratio)
    gain = after.expected_tokens_per_s / before.expected_tokens_per_s
    assert 1 < gain < ratio
    # q, k, v and gate, up share a factor each: four more products in each of 16 layers.
    assert kept.kernels - dense.kernels == 4 * 16


def test_expected_is_below_the_bound_and_a_model_beyond_the_memory_does_not_fit() -> None:
    traffic = traffic_of_shape(_SHAPES["llama-3.1-70b"], "int4")
    nano, thor = (predicted(traffic, name, 128) for name in ("orin-nano-8gb", "thor"))
    assert (nano.fits, thor.fits) == (False, True)
    for prediction in (nano, thor):
        assert prediction.expected_tokens_per_s < prediction.bound_tokens_per_s
        assert prediction.efficiency == pytest.approx(
            prediction.expected_tokens_per_s / prediction.bound_tokens_per_s
        )


def test_a_longer_context_is_slower() -> None:
    traffic = traffic_of_shape(_SHAPES["qwen3-0.6b"], "int4")
    rates = [predicted(traffic, "thor", n).expected_tokens_per_s for n in (128, 4096)]
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
    before, after = (predicted(traffic, "agx-orin-64gb", 32768) for traffic in (dense, latent))
    assert after.rebuild_flop == pytest.approx(36 * 32768 * 2 * 512 * 1024)
    assert after.bytes_per_token < before.bytes_per_token
    assert after.expected_tokens_per_s < before.expected_tokens_per_s
    assert (before.rebuilding_pays, after.rebuilding_pays) == (None, False)
    by_head = replace(latent, rebuilt=[RebuiltKeys.of((8, 1, 64, 128), 1024, 2)] * 36)
    assert predicted(by_head, "agx-orin-64gb", 32768).rebuilding_pays
    for prediction in (before, after):
        assert prediction.expected_tokens_per_s < prediction.bound_tokens_per_s


@pytest.mark.parametrize("name", PUBLISHED_GB_PER_S)
def test_bus_width_times_data_rate_is_the_published_bandwidth(name: str) -> None:
    assert DEVICES[name].gb_per_s == pytest.approx(PUBLISHED_GB_PER_S[name], rel=0.006)


def test_devices_are_found_once_each_in_the_order_given() -> None:
    found = find_devices("thor, RTX-4090,thor,")
    assert [device.name for device in found] == ["thor", "rtx-4090"]


@pytest.mark.parametrize("names", ["tpu-v9", "", "thor,tpu-v9", "tpu-v9@15w"])
def test_an_unknown_device_is_refused_with_the_known_ones(names: str) -> None:
    with pytest.raises(UsageError) as refused:
        find_devices(names)
    for name in DEVICES:
        assert name in str(refused.value)


@pytest.mark.parametrize("names", ["orin-nano-8gb@900w", "thor@15w"])
def test_an_unknown_power_mode_is_refused(names: str) -> None:
    with pytest.raises(UsageError, match=names):
        find_devices(names)


def test_all_power_modes_are_found_at_once_and_more_watts_are_never_slower() -> None:
    modes = find_devices("orin-nano-8gb@all")
    assert [device.mode for device in modes] == ["7w", "15w", "25w", "maxn"]
    traffic = traffic_of_shape(_SHAPES["qwen3-0.6b"], "int4")
    rates = [predicted(traffic, device, 128).expected_tokens_per_s for device in modes]
    assert rates == sorted(rates)
    assert rates[1] > 2 * rates[0]


@pytest.mark.parametrize("dtype", ["int4", "q4_k_m"])
@pytest.mark.parametrize("name", ["qwen3-8b", "gemma3-4b"])
def test_what_did_not_run_on_an_orin_nano_is_never_said_to_fit_it(name: str, dtype: str) -> None:
    traffic = traffic_of_shape(_SHAPES[name], dtype)
    for device in find_devices("orin-nano-8gb@all,orin-nano-8gb-super"):
        for engine in (OURS, EDGE_LLM, LLAMA_CPP):
            assert not predicted(traffic, device, 128, engine).fits


@pytest.mark.parametrize(
    ("l4t", "free_gb", "verdict"),
    [
        ("36.5", 6.0, "fits"), (None, 6.0, "needs L4T 36.5"), ("36.4.7", 6.0, "does not fit"),
        ("39.2", 3.0, "may not fit"), ("39.2", 2.0, "does not fit"),
    ],
)  # fmt: skip
def test_memory_and_release_decide_whether_a_model_fits(
    l4t: str | None, free_gb: float, verdict: str
) -> None:
    traffic = traffic_of_shape(_SHAPES["qwen3-1.7b"], "int4")
    board = replace(DEVICES["orin-nano-8gb"], l4t=l4t, free_bytes=int(free_gb * 1e9))
    found = predicted(traffic, board, 1024)
    assert (found.verdict, found.fits) == (verdict, verdict == "fits")


def test_our_engine_is_expected_between_the_other_two_and_its_interval_holds_theirs() -> None:
    traffic = traffic_of_shape(_SHAPES["qwen3-0.6b"], "int4")
    ours, quick, slow = (
        predicted(traffic, "orin-nano-8gb", 128, engine) for engine in (OURS, EDGE_LLM, LLAMA_CPP)
    )
    assert slow.expected_tokens_per_s < ours.expected_tokens_per_s < quick.expected_tokens_per_s
    assert ours.tokens_per_s.low == slow.tokens_per_s.low
    assert ours.tokens_per_s.high == quick.tokens_per_s.high
    assert ours.prefill_ms is None
    assert quick.prefill_ms is not None
    assert quick.prefill_ms.low > quick.least_prefill_ms > 0


def test_each_engine_is_counted_with_its_own_type_of_weights() -> None:
    targets = BenchTarget.of_shape("qwen3-0.6b", "int4", [1.0])
    rows = predict(targets, find_devices("orin-nano-8gb"), 128)["rows"]
    assert [row["counted_as"] for row in rows] == ["int4", "int4", "q4_k_m"]
    assert rows[2]["bytes_per_token"] != rows[1]["bytes_per_token"]


def test_a_cache_that_grows_by_concat_is_moved_three_times_in_our_engine_alone() -> None:
    traffic = traffic_of_shape(_SHAPES["qwen3-0.6b"], "float16")
    growing = replace(traffic, cache_passes=3)
    more = [
        predicted(growing, "thor", 2048, engine).bytes_per_token
        - predicted(traffic, "thor", 2048, engine).bytes_per_token
        for engine in (OURS, EDGE_LLM)
    ]
    assert more == [2 * traffic.cache_bytes(2048), 0]


@pytest.mark.parametrize(
    ("device", "change"),
    [
        (DEVICES["orin-nano-8gb"], "fewer bits"),
        (replace(DEVICES["orin-nano-8gb"], free_bytes=10**10, l4t="36.4.7"), "36.5"),
    ],
)
def test_a_model_that_runs_on_no_device_is_refused_with_the_cure(
    device: DeviceSpec, change: str
) -> None:
    record = predict(BenchTarget.of_shape("qwen3-8b", "int4", [1.0]), [device], 128)
    with pytest.raises(ResourceError, match=change) as refused:
        require_a_fit(record)
    assert refused.value.exit_status == 4
    fitting = predict(
        BenchTarget.of_shape("qwen3-8b", "int4", [1.0]), [device, DEVICES["thor"]], 128
    )
    require_a_fit(fitting)


def test_joules_are_only_predicted_where_power_was_published() -> None:
    traffic = traffic_of_shape(_SHAPES["qwen3-0.6b"], "int4")
    known = {
        device.name: predicted(traffic, device, 128).joules_per_token is not None
        for device in find_devices("orin-nano-8gb@all,agx-orin-64gb,thor,rtx-4090")
    }
    assert [name for name, is_known in known.items() if is_known] == [
        f"orin-nano-8gb@{mode}" for mode in ("15w", "25w", "maxn")
    ]


def test_a_kernel_costs_more_on_a_slower_clock() -> None:
    fit = DecodeFit.of(EDGE_LLM)
    slow, quick = (replace(DEVICES["thor"], ghz=ghz) for ghz in (0.5, 1.0))
    assert fit.seconds(0, 100, slow) == pytest.approx(2 * fit.seconds(0, 100, quick))


@pytest.mark.parametrize(
    ("device", "engine", "start"),
    [
        ("orin-nano-8gb@25w", LLAMA_CPP, "24, at most"),
        ("orin-nano-8gb", EDGE_LLM, "6, at most"),
        ("rtx-4090", EDGE_LLM, "none"),
        ("thor", LLAMA_CPP, "none"),
        ("thor", OURS, "none"),
    ],
)
def test_it_is_said_how_many_figures_of_a_device_there_are(
    device: str, engine: str, start: str
) -> None:
    (found,) = find_devices(device)
    assert _published_of(judged_figures()["published"], found, engine).startswith(start)
