"""Requests: what they refuse, and what they come down to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pipeline.compress.methods import DEFAULT_EFFORT, DEFAULT_METHOD, EFFORTS, METHODS
from pipeline.compress.request import CompressRequest
from pipeline.errors import UsageError
from pipeline.memory import parse_bytes
from pipeline.quantize.formats import RUNTIMES


def request(method: str, **changes: object) -> CompressRequest:
    return CompressRequest("tiny", method=method, **changes)  # type: ignore[arg-type]


def test_switching_cat_and_skip_off_narrows_a_method() -> None:
    asked = request(DEFAULT_METHOD, cat=False, skip=False).resolved_method
    assert not asked.cat
    assert not asked.skip
    assert not request("svd-llm", cat=True, skip=True).resolved_method.cat


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("effort", EFFORTS)
def test_the_effort_changes_how_ours_is_fitted_and_no_other(method: str, effort: str) -> None:
    resolved = request(method, effort=effort).resolved_method
    stated = METHODS[method]
    if stated.allocation.name == "searched":
        assert resolved.fit == replace(stated.fit, mix=EFFORTS[effort].mix)
    else:
        assert resolved == stated


def test_windows_that_are_asked_for_replace_those_of_the_effort() -> None:
    effort = EFFORTS[DEFAULT_EFFORT]
    assert request("skipcat", calibration="text.txt").resolved_effort == effort
    asked = request("skipcat", windows=5, window_length=7).resolved_effort
    assert (asked.windows, asked.window_length, asked.survey_windows) == (5, 7, 5)
    many = request("skipcat", windows=10_000).resolved_effort
    assert many.survey_windows == effort.survey_windows
    # Gradients are of no fewer tokens for that.
    short = request("skipcat", windows=10_000, window_length=100).resolved_effort
    assert short.survey_windows == 6 * effort.survey_windows
    long = request("skipcat", windows=10_000, window_length=2048).resolved_effort
    assert long.survey_windows == effort.survey_windows


@pytest.mark.parametrize("name", EFFORTS)
def test_text_of_the_model_itself_is_as_long_in_shorter_windows(name: str) -> None:
    effort, own = EFFORTS[name], request("skipcat", effort=name, calibration="self").resolved_effort
    assert own.window_length < effort.window_length
    assert own.windows * own.window_length == effort.windows * effort.window_length
    assert own.survey_windows * own.window_length == effort.survey_windows * effort.window_length


@pytest.mark.parametrize(
    ("changes", "named"), [({"method": "pruning"}, "--method"), ({"effort": "huge"}, "--effort")]
)
def test_a_name_that_does_not_exist_is_refused_with_those_that_do(
    changes: dict[str, str], named: str
) -> None:
    with pytest.raises(UsageError, match="no such choice") as caught:
        CompressRequest("tiny", **changes).check()  # type: ignore[arg-type]
    assert caught.value.details["where"] == named
    known = METHODS if named == "--method" else EFFORTS
    assert caught.value.details["expected"] == ", ".join(known)


@pytest.mark.parametrize("method", METHODS)
def test_one_shot_fits_to_the_original_alone(method: str) -> None:
    fit = request(method, effort="max", one_shot=True).resolved_method.fit
    assert fit.mix is None
    assert not fit.describe()["reconstruct"]


@pytest.mark.parametrize("method", METHODS)
def test_one_sided_weighs_all_outputs_alike_and_keeps_the_allocation(method: str) -> None:
    resolved = request(method, one_sided=True).resolved_method
    assert not resolved.fit.two_sided
    assert resolved.allocation == METHODS[method].allocation
    assert resolved.needs_costs == (resolved.allocation.name == "searched")


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_a_mix_replaces_that_of_the_effort(mix: float) -> None:
    asked = request(DEFAULT_METHOD, mix=mix)
    asked.check()
    assert asked.resolved_method.fit.mix == mix


@pytest.mark.parametrize(
    "changes", [{"mix": -0.1}, {"mix": 1.1}, {"mix": float("nan")}, {"mix": 0.5, "one_shot": True}]
)
def test_a_mix_that_cannot_be_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="no such mixture") as caught:
        request(DEFAULT_METHOD, **changes).check()
    assert caught.value.details["where"] == "--mix"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"memory": "1MB", "keep_bytes": 0.5}, "--memory, --keep-bytes, --weights"),
        ({"memory": "1MB", "weights": "int8-b32-sym"}, "--memory, --keep-bytes, --weights"),
        ({"keep_bytes": 0.5, "weights": "int8-b32-sym"}, "--memory, --keep-bytes, --weights"),
        ({"keep_bytes": 0.0}, "--keep-bytes"),
        ({"keep_bytes": 1.01}, "--keep-bytes"),
        ({"keep_bytes": float("nan")}, "--keep-bytes"),
        ({"memory": "much"}, "--memory"),
        ({"memory": "0"}, "--memory"),
        ({"memory": "-5MB"}, "--memory"),
        ({"memory": "60MB", "method": "skipcat"}, "--method skipcat"),
        ({"keep_bytes": 0.5, "method": "svd-llm"}, "--method svd-llm"),
        ({"method": "rtn"}, "--method rtn"),
        ({"method": "gptq", "table": "int8-b64-sym"}, "--method gptq"),
        ({"weights": "int5-b32-asym"}, "--weights"),
        ({"weights": "int4-b32"}, "--weights"),
        ({"weights": "four bits"}, "--weights"),
        ({"table": "int4-b32-both"}, "--table"),
        ({"weights": "int3-b32-asym"}, "--weights"),
        ({"weights": "int8-row-sym"}, "--weights"),
        ({"table": "int4-b32-asym", "runtime": "tensorrt"}, "--table"),
        ({"weights": "int4-b32-sym", "runtime": "tensorrt"}, "--weights"),
        ({"runtime": "abacus"}, "--runtime"),
    ],
)
def test_budgets_and_formats_that_cannot_be_meant_are_refused(
    changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(UsageError) as caught:
        CompressRequest("tiny", **changes).check()
    assert caught.value.details["where"] == named
    assert "expected" in caught.value.details or "observed" in caught.value.details


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_format_that_a_runtime_does_not_take_is_refused_with_those_it_does(runtime: str) -> None:
    refused = CompressRequest("tiny", weights="int5-b32-asym", runtime=runtime)
    with pytest.raises(UsageError, match="no such format"):
        refused.check()
    for style in RUNTIMES[runtime].formats:
        CompressRequest("tiny", weights=style.name, runtime=runtime).check()
    if runtime != "any":
        with pytest.raises(UsageError, match="does not multiply") as caught:
            CompressRequest("tiny", weights="int3-b32-asym", runtime=runtime).check()
        assert caught.value.details["expected"] == RUNTIMES[runtime].takes
        assert "--runtime any" in caught.value.details["change"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("60MB", 60_000_000),
        ("60mb", 60_000_000),
        (" 1.5 GiB ", 3 << 29),
        ("512KiB", 512 << 10),
        ("12345", 12345),
        (".5k", 500),
        ("2G", 2_000_000_000),
    ],
)
def test_bytes_are_read_as_they_are_written(text: str, size: int) -> None:
    assert parse_bytes(text, "--memory") == size
    assert CompressRequest("tiny", memory=text).budget_bytes(1) == size


def test_a_share_of_bytes_is_one_of_the_float16_bytes() -> None:
    assert CompressRequest("tiny", keep_bytes=0.25).budget_bytes(1000) == 250


def test_the_fast_effort_reads_as_much_text_as_the_widest_input_needs() -> None:
    fast = CompressRequest("m", effort="fast", keep_params=0.5, calibration="text.txt")
    effort = fast.resolved_effort
    # 11 tokens for each of 1536 numbers, in windows of 512; never less than the gradients are of.
    assert [effort.windows_for(width) for width in (16, 1536, 11008)] == [20, 33, 64]
    asked = replace(fast, windows=50).resolved_effort
    assert [asked.windows_for(width) for width in (16, 1536, 11008)] == [50] * 3
    whole = replace(fast, effort="default").resolved_effort
    assert whole.windows_for(16) == whole.windows
