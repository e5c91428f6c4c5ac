"""The ONNX profiles: which operators the graph may use, and how its cache works."""

from __future__ import annotations

from dataclasses import dataclass

# The domain of ONNX Runtime's own operators.
CONTRIB = "com.microsoft"


@dataclass(frozen=True)
class Profile:
    """A family of runtimes that one graph serves.

    Attributes:
        name: as the user writes it.
        opset: of the default domain.
        static_cache: the cache has a fixed length and is written in place (TensorScatter), instead
            of growing (Concat).
        native_attention: Attention, RMSNormalization and RotaryEmbedding as single operators,
            instead of primitives.
        contrib: ONNX Runtime's own operators (com.microsoft): attention that rotates, writes the
            cache and attends in one node, norms that add, matrices of few bits.
        runs_in: for messages.
    """

    name: str
    opset: int
    static_cache: bool
    native_attention: bool
    contrib: bool
    runs_in: str


PROFILES = {
    "opset24": Profile(
        "opset24", 24, True, True, False, "ONNX Runtime >= 1.25, TensorRT >= 10.15, RTX"
    ),
    "compat": Profile("compat", 18, False, False, False, "ONNX Runtime >= 1.18, TensorRT >= 10.0"),
    "cpu": Profile("cpu", 23, True, True, True, "ONNX Runtime >= 1.23 and onnxruntime-genai, CPU"),
}
