"""Published decode speeds, of others' engines on devices, which predictions are held against."""

from __future__ import annotations

from dataclasses import dataclass

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
class Figure:
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


def _edge_llm(device: str, dtype: str, context: int, speeds: dict[str, float]) -> list[Figure]:
    return [
        Figure(device, f"qwen3-{size}", dtype, context, speed, True, _EDGE_LLM)
        for size, speed in speeds.items()
    ]


def _mlc(device: str, speeds: dict[str, float]) -> list[Figure]:
    return [
        Figure(device, shape, "q4f16", _SHORT_CONTEXT, speed, False, _MLC)
        for shape, speed in speeds.items()
    ]


# The page does not say in which mode the Orin Nano ran. From its one figure to the other, each
# further byte takes as long as at 62 GB/s: 91% of 68, or 61% of the 102 of Super mode, where it is
# 83% on the AGX and 95% on the NX. It is taken for the former.
FIGURES = (
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
