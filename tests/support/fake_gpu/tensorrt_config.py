"""What a build of the fake TensorRT is told: limits, profiles and timings."""

from __future__ import annotations

import os
from typing import Any

from tensorrt_enums import MemoryPoolType, PreviewFeature, ProfilingVerbosity


def version() -> str:
    """The version that the fake is of."""
    return os.environ.get("FAKE_TENSORRT", "10.16.1.11")


class IOptimizationProfile:
    def __init__(self) -> None:
        self.extra_memory_target = 1.0
        self._shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self._shapes[input] = [list(min), list(opt), list(max)]


class ITimingCache:
    """Of a version; the fake's kernels take no time that is worth keeping."""

    def __init__(self, content: bytes) -> None:
        self._content = content or f"timings of {version()}".encode()

    def serialize(self) -> bytes:
        return self._content


class IBuilderConfig:
    def __init__(self) -> None:
        self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
        self._profiles: list[IOptimizationProfile] = []
        self._timings: ITimingCache | None = None
        self._previews: set[PreviewFeature] = set()

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        if not ignore_mismatch and version().encode() not in cache.serialize():
            return False
        self._timings = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._timings

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        assert pool_size > 0

    def set_preview_feature(self, feature: PreviewFeature, enable: bool) -> None:
        (self._previews.add if enable else self._previews.discard)(feature)

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        for low, _, high in profile._shapes.values():
            if any(least > most for least, most in zip(low, high, strict=True)):
                return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1
