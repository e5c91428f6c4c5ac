from __future__ import annotations

import pytest

from pipeline.engine.target import Target, _Host, resolve_target
from pipeline.errors import InputError, MissingPackageError, UsageError
from pipeline.gpu import RTX_CAPABILITIES, Gpu

BARE = _Host(None, has_standard=False)
RTX_3090 = Gpu("NVIDIA GeForce RTX 3090", (8, 6))
ORIN = Gpu("NVIDIA Jetson AGX Orin", (8, 7))
H200 = Gpu("NVIDIA H200", (9, 0))


@pytest.mark.parametrize("text", ["sm86", "SM86", "8.6", "86", "sm_86", "rtx:sm86", " rtx:8.6 "])
def test_every_spelling_of_a_capability_means_the_same_rtx_target(text: str) -> None:
    target = resolve_target(text, BARE)
    assert (target.flavour, target.compute_capability) == ("rtx", (8, 6))


def test_two_digit_majors_are_understood() -> None:
    assert resolve_target("sm120", BARE).compute_capability == (12, 0)
    assert resolve_target("12.1", BARE).compute_capability == (12, 1)


def test_cpu_needs_no_capability() -> None:
    assert resolve_target("cpu", BARE) == Target(
        "cpu", None, "asked for: ONNX Runtime runs the ONNX folder as it is"
    )


@pytest.mark.parametrize(
    ("gpu", "has_standard", "flavour", "capability"),
    [
        (None, False, "rtx", (8, 6)),
        (None, True, "rtx", (8, 6)),
        (RTX_3090, True, "tensorrt", (8, 6)),
        (RTX_3090, False, "rtx", (8, 6)),
        (ORIN, True, "tensorrt", (8, 7)),
        (H200, True, "tensorrt", (9, 0)),
    ],
)
def test_auto_takes_standard_tensorrt_where_it_can_and_rtx_otherwise(
    gpu: Gpu | None, has_standard: bool, flavour: str, capability: tuple[int, int]
) -> None:
    target = resolve_target("auto", _Host(gpu, has_standard))
    assert (target.flavour, target.compute_capability) == (flavour, capability)


def test_auto_without_a_gpu_says_so() -> None:
    assert "no NVIDIA GPU" in resolve_target("auto", BARE).reason


def test_auto_on_a_gpu_that_rtx_does_not_cover_names_the_missing_package() -> None:
    with pytest.raises(MissingPackageError, match="tensorrt"):
        resolve_target("auto", _Host(H200, has_standard=False))


@pytest.mark.parametrize("text", ["sm87", "orin", "sm90", "sm100", "sm110", "rtx:sm87"])
def test_gpus_that_rtx_does_not_cover_are_sent_to_standard_tensorrt(text: str) -> None:
    with pytest.raises(InputError, match=r"standard TensorRT") as caught:
        resolve_target(text, BARE)
    assert "machine with" in caught.value.details["change"]


@pytest.mark.parametrize("text", ["orin", "sm87", "8.7"])
def test_orin_is_built_with_standard_tensorrt_on_an_orin(text: str) -> None:
    target = resolve_target(text, _Host(ORIN, has_standard=True))
    assert (target.flavour, target.compute_capability) == ("tensorrt", (8, 7))


def test_tensorrt_without_a_gpu_is_refused() -> None:
    with pytest.raises(InputError, match="needs an NVIDIA GPU"):
        resolve_target("tensorrt", _Host(None, has_standard=True))


def test_tensorrt_that_is_not_installed_is_named() -> None:
    with pytest.raises(MissingPackageError):
        resolve_target("tensorrt", _Host(RTX_3090, has_standard=False))


@pytest.mark.parametrize("text", ["", "graphics", "sm", "sm8", "8.66", "rtx:", "tensorrt:sm86"])
def test_other_words_are_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        resolve_target(text, BARE)


def test_the_rtx_library_knows_exactly_the_listed_capabilities() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13")
    names = {name for name in trt.ComputeCapability.__members__ if name.startswith("SM")}
    assert names == {f"SM{major}{minor}" for major, minor in RTX_CAPABILITIES}
