"""Kernels that TensorRT for RTX compiled for the shapes of an engine, kept beside it.

A plan for RTX holds no kernels of the GPU that runs it: they are compiled when a shape comes for
the first time. TensorRT itself looks whether what was kept is of this GPU, driver and version.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from pathlib import Path
from typing import Any

from pipeline.progress import note

_FILE = "runtime.cache"


class RuntimeCache:
    """The runtime cache of an engine, for all of its contexts; written when its work is done.

    Args:
        engine: of TensorRT for RTX, loaded: CUDA's context is there by now.
        folder: of the engine; where it cannot be written to, every run compiles them, aloud.
    """

    def __init__(self, engine: Any, folder: Path) -> None:
        path = folder / _FILE
        self._cache = engine.create_runtime_config().create_runtime_cache()
        kept = path.read_bytes() if path.is_file() else b""
        if kept and not self._cache.deserialize(kept):
            note(
                f"{path.name}: kernels of an earlier run are of another GPU, driver or TensorRT, "
                "and are compiled again"
            )
        elif not kept:
            note("kernels for this GPU are compiled once, which takes a while")
        weakref.finalize(self, _keep, self._cache, path, kept)

    def lend(self, config: Any) -> None:
        """Have the contexts of a configuration find their kernels here, and leave new ones."""
        if not config.set_runtime_cache(self._cache):
            note("TensorRT takes no runtime cache: kernels are compiled again by every run")


def _keep(cache: Any, path: Path, kept: bytes) -> None:
    """Write what a cache holds by now, aside and then renamed; a reader never sees half of it."""
    content = bytes(memoryview(cache.serialize()))
    if content == kept:
        return
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_bytes(content)
        aside.replace(path)
    except OSError as error:
        note(f"compiled kernels cannot be kept for the next run: {error}")
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
