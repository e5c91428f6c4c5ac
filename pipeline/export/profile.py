"""The two ONNX profiles: which operators the graph may use, and how its cache works."""

from __future__ import annotations

from dataclasses import dataclass


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
        runs_in: for messages.
    """

    name: str
    opset: int
    static_cache: bool
    native_attention: bool
    runs_in: str


PROFILES = {
    "opset24": Profile("opset24", 24, True, True, "ONNX Runtime >= 1.25, TensorRT >= 10.15, RTX"),
    "compat": Profile("compat", 18, False, False, "ONNX Runtime >= 1.18, TensorRT >= 10.0"),
}
