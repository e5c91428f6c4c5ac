"""A decoder's engine against the manifest beside it, before buffers of its sizes are made.

TensorRT writes as much as its engine says to wherever it is pointed at.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.engine.manifest import MANIFEST_FILE, mismatch
from pipeline.engine.profiles import ShapeProfile
from pipeline.export.contract import CACHE_PREFIX, LOGITS, PROFILES, present_name
from pipeline.json_file import json_field

if TYPE_CHECKING:
    import tensorrt as trt

_FIXED = {1: "heads", 3: "width"}


def require_engine_interface(
    engine: trt.ICudaEngine,
    manifest: dict[str, Any],
    profiles: Sequence[ShapeProfile],
    folder: Path,
) -> None:
    """Hold the tensors of an engine to its manifest.

    Args:
        engine: as TensorRT loaded it.
        manifest: content of manifest.json.
        profiles: of which the first is for decoding; empty is refused.
        folder: of both, for messages.

    Raises:
        InputError: a field that running needs is missing, or the engine has other tensors.
    """
    path = folder / MANIFEST_FILE
    made_of = json_field(manifest, "onnx", dict, path)
    width, length = (json_field(made_of, name, int, path) for name in ("vocab_size", "max_length"))
    profile = json_field(made_of, "profile", str, path)
    limits = json_field(manifest, "limits", dict, path)
    for name in ("max_batch", "max_prefill"):
        if json_field(limits, name, int, path) < 1:
            raise mismatch(name, path, limits[name], "at least 1")
    if not profiles or profile not in PROFILES:
        raise mismatch("profile", path, profile, " or ".join(PROFILES))
    inputs = profiles[0].shapes
    past = [name for name in inputs if name.startswith(CACHE_PREFIX)]
    names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    promised = {*inputs, LOGITS, *map(present_name, past)}
    if names != promised:
        raise mismatch("set of tensors", path, sorted(promised - names), sorted(names - promised))
    _require_dims(engine, LOGITS, {-1: width}, path)
    for name in past:
        sizes = {axis: inputs[name].max[axis] for axis in _FIXED}
        if PROFILES[profile].static_cache:
            sizes[2] = length
        _require_dims(engine, name, sizes, path)


def _require_dims(engine: trt.ICudaEngine, name: str, sizes: dict[int, int], path: Path) -> None:
    """Raise InputError unless axes of a tensor are of these sizes, where the engine fixes them."""
    dims = engine.get_tensor_shape(name)
    shape = tuple(dims[axis] for axis in range(len(dims)))
    found = {axis: shape[axis] for axis in sizes if len(shape) > max(2, axis)}
    if found.keys() != sizes.keys() or any(found[a] not in (-1, sizes[a]) for a in sizes):
        raise mismatch(f"shape of {name}", path, shape, sizes)
