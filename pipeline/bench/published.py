"""Published figures of decoders on devices, batch 1: some to fit constants to, others to judge by.

Fitted are the figures that were at hand when the model was chosen. The tables that the others are
from were seen by whoever chose its form; no constant was taken from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["decode", "prefill", "memory", "energy"]

EDGE_LLM, LLAMA_CPP = "Edge-LLM", "llama.cpp"
_MLC = "MLC"
_AGX, _NX, _NANO = "agx-orin-64gb", "orin-nx-16gb", "orin-nano-8gb"
_SUPER = "orin-nano-8gb-super"
_PAGE = "https://nvidia.github.io/TensorRT-Edge-LLM/{}/user_guide/performance/performance-benchmarks.html"
_V9 = "TensorRT Edge-LLM 0.9.0, performance benchmarks: " + _PAGE.format("0.9.1")
_BENCH = "TensorRT Edge-LLM 0.10.0, llm_bench: " + _PAGE.format("0.10.0")
_RUN = "TensorRT Edge-LLM 0.10.0, runtime dashboard: " + _PAGE.format("0.10.0")
_USER = "a user's run, TensorRT 10.7: https://github.com/NVIDIA/TensorRT-Edge-LLM/issues/60"
_BLOG = (
    "NVIDIA's blog on the Orin Nano Super, MLC: https://developer.nvidia.com/blog/"
    "nvidia-jetson-orin-nano-developer-kit-gets-a-super-boost/"
)
_MODES = ("7w", "15w", "25w", "maxn")
_SWEEP = (
    "llama.cpp b9292 on an Orin Nano Super, table 9: "
    "https://www.smolhub.com/posts/jetson-nano-super-benchmark-non-reasoning/"
)
# Prompt and half of the answer; the pages name no context for these.
_SHORT = 128
_LONG = 2048
# MLC's "SmolLM2" has no size on that page; 1.7B is taken.
# Of the sweep: a prompt of 2,048 tokens, and half of the 256 that answer it.
_SWEEP_CONTEXT = 2176
# What the engines of the memory figures were built to hold.
_CACHE_TOKENS = 2200


@dataclass(frozen=True)
class Figure:
    """One published figure, batch 1.

    Attributes:
        kind: `decode` in tokens/s, `prefill` in ms, `memory` in bytes of the GPU, `energy` in
            joules for a token, on the rail of CPU and GPU.
        engine: whose it is.
        device: a name that `find_devices` knows.
        shape: a name that `find_shape` knows.
        dtype: of its weights, as of `traffic_of_shape`.
        tokens: in the cache; of the prompt, for `prefill`.
        value: as published, in the unit of the kind.
        fitted: whether constants of the prediction were fitted to it.
        source: where it was published.
    """

    kind: Kind
    engine: str
    device: str
    shape: str
    dtype: str
    tokens: int
    value: float
    fitted: bool
    source: str


_Sizes = dict[str, float]


def _qwen3(
    kind: Kind,
    device: str,
    dtype: str,
    tokens: int,
    source: str,
    fitted: _Sizes | None = None,
    judged: _Sizes | None = None,
) -> list[Figure]:
    """Figures of Edge-LLM for sizes of Qwen3: those to fit, and those to judge by."""
    return [
        Figure(kind, EDGE_LLM, device, f"qwen3-{size}", dtype, tokens, value, is_fitted, source)
        for is_fitted, values in ((True, fitted or {}), (False, judged or {}))
        for size, value in values.items()
    ]


def _sweep(
    shape: str,
    dtype: str,
    tokens_per_s: tuple[float, ...],
    tokens_per_joule: tuple[float, ...],
    fitted: tuple[str, ...] = (),
) -> list[Figure]:
    """A model of the sweep over the power modes; power at 7 W is only approximate there."""

    def of(kind: Kind, mode: str, value: float) -> Figure:
        device = f"{_NANO}@{mode}"
        used = mode in fitted
        return Figure(kind, LLAMA_CPP, device, shape, dtype, _SWEEP_CONTEXT, value, used, _SWEEP)

    speeds = zip(_MODES, tokens_per_s, strict=True)
    yields = zip(_MODES[1:], tokens_per_joule, strict=True)
    return [
        *(of("decode", mode, value) for mode, value in speeds),
        *(of("energy", mode, 1 / value) for mode, value in yields),
    ]


_MLC_SHAPES = ("llama-3.2-3b", "llama-3.1-8b", "qwen2.5-7b", "smollm2-1.7b")


def _mlc(device: str, shapes: Sequence[str], speeds: Sequence[float]) -> list[Figure]:
    return [
        Figure("decode", _MLC, device, shape, "q4f16", _SHORT, speed, False, _BLOG)
        for shape, speed in zip(shapes, speeds, strict=True)
    ]


def _user(dtype: str, speed: float, *, fitted: bool) -> Figure:
    return Figure("decode", EDGE_LLM, _AGX, "qwen3-4b", dtype, _SHORT, speed, fitted, _USER)


_INT4 = ("int4", _LONG, _BENCH)
_NVFP4 = ("nvfp4", _LONG, _BENCH)
_INT4_RUN = ("int4", _SHORT, _RUN)
_INT4_V9, _NVFP4_V9 = ("int4", _SHORT, _V9), ("nvfp4", _LONG, _V9)
_INT4_MEMORY, _INT4_PROMPT = ("int4", _CACHE_TOKENS, _RUN), ("int4", 61, _RUN)
_THOR, _SPARK = "thor", "dgx-spark"


def _sizes(*values: float) -> _Sizes:
    """Of Qwen3 from the smallest on; 0 for none."""
    return {size: v for size, v in zip(("0.6b", "1.7b", "4b", "8b"), values, strict=False) if v}


_DECODE = (
    *_qwen3("decode", _AGX, *_INT4, _sizes(0, 89.5, 0, 30.6), _sizes(162.5, 0, 50.7)),
    *_qwen3("decode", _NX, *_INT4, _sizes(98.9, 0, 29.2), _sizes(0, 52.2, 0, 17.5)),
    *_qwen3("decode", _NANO, *_INT4, _sizes(61.0), _sizes(0, 32.3)),
    *_qwen3("decode", _THOR, *_INT4, _sizes(0, 135.1, 0, 46.4), _sizes(253.1, 0, 76.5)),
    *_qwen3("decode", _SPARK, *_INT4, _sizes(251.4, 133.9, 73.9, 43.5)),
    _user("int4", 52.2, fitted=True),
    _user("int8", 35.5, fitted=True),
    _user("float16", 20.2, fitted=False),
    *_qwen3("decode", _THOR, *_NVFP4, None, _sizes(244.3, 135.5, 73.4, 44.6)),
    *_qwen3("decode", _SPARK, *_NVFP4, None, _sizes(214.0, 116.6, 63.1, 38.4)),
    *_qwen3("decode", _AGX, *_INT4_RUN, None, _sizes(200.5, 99.8, 55.3, 32.2)),
    *_qwen3("decode", _NX, *_INT4_RUN, None, _sizes(124.9, 59.0, 32.2, 18.4)),
    *_qwen3("decode", _NANO, *_INT4_RUN, None, _sizes(77.0, 36.5)),
    *_qwen3("decode", _THOR, *_INT4_RUN, None, _sizes(319.7, 154.1, 83.3, 49.0)),
    *_qwen3("decode", _SPARK, *_INT4_RUN, None, _sizes(319.3, 152.1, 80.2, 45.6)),
    *_qwen3("decode", _AGX, *_INT4_V9, None, _sizes(186.4, 98.6, 53.1, 32.5)),
    *_qwen3("decode", _NX, *_INT4_V9, None, _sizes(117.4, 60.4, 31.6, 19.0)),
    *_qwen3("decode", _NANO, *_INT4_V9, None, _sizes(72.8, 37.4)),
    *_qwen3("decode", _THOR, *_NVFP4_V9, None, _sizes(245.4, 135.5, 73.7, 44.4)),
    *_mlc(_NANO, _MLC_SHAPES, (27.7, 14.0, 14.2, 41.0)),
    *_mlc(_SUPER, _MLC_SHAPES, (43.07, 19.14, 21.75, 64.5)),
)
_SWEEPS = (
    *_sweep("smollm2-135m", "q4_k_m", (53.8, 114.7, 165.2, 159.5), (27.58, 29.62, 24.72), _MODES),
    *_sweep("qwen3-0.6b", "q8_0", (14.2, 33.9, 49.4, 54.3), (6.83, 7.26, 6.68), ("15w",)),
    *_sweep("llama-3.2-1b", "q4_k_m", (12.1, 32.3, 47.1, 51.9), (5.34, 5.48, 4.89), ("maxn",)),
    *_sweep("smollm2-360m", "q8_0", (34.9, 70.6, 102.2, 89.6), (14.71, 15.50, 12.64)),
    *_sweep("qwen2.5-0.5b", "q4_k_m", (27.5, 68.5, 92.9, 100.6), (13.14, 13.30, 11.78)),
    *_sweep("gemma3-1b", "q4_k_m", (11.2, 28.1, 40.8, 44.3), (5.66, 6.02, 5.19)),
)
_PREFILL = (
    *_qwen3("prefill", _AGX, *_INT4, _sizes(0, 308.3, 0, 1384.1), _sizes(118.5, 0, 761.9)),
    *_qwen3("prefill", _NX, *_INT4, _sizes(268.8, 0, 1880.5), _sizes(0, 674.0, 0, 2944.1)),
    *_qwen3("prefill", _NANO, *_INT4, _sizes(445.2), _sizes(0, 1021.0)),
    *_qwen3("prefill", _AGX, *_INT4_PROMPT, None, _sizes(12.8, 24.3, 0, 74.7)),
    *_qwen3("prefill", _NX, *_INT4_PROMPT, None, _sizes(17.6, 39.5, 0, 134.5)),
    *_qwen3("prefill", _NANO, *_INT4_PROMPT, None, _sizes(30.7, 69.8)),
)
_MEMORY = (
    *_qwen3("memory", _AGX, *_INT4_MEMORY, _sizes(1943e6, 2978e6, 4619e6, 7199e6)),
    *_qwen3("memory", _NX, *_INT4_MEMORY, None, _sizes(1914e6, 2999e6, 4605e6, 7167e6)),
    *_qwen3("memory", _NANO, *_INT4_MEMORY, None, _sizes(1917e6, 2992e6)),
)
FIGURES: tuple[Figure, ...] = (*_DECODE, *_SWEEPS, *_PREFILL, *_MEMORY)
