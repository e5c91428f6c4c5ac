"""What a plan holds: its layers, and the shapes that it runs. Read in a process of its own.

Deserialising takes as much memory as the plan has weights, which the builder still holds while it
lives; a process that is killed for it leaves the finished plan alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.engine.log import make_logger
from pipeline.engine.profiles import ShapeProfile
from pipeline.errors import InputError

if TYPE_CHECKING:
    import tensorrt as trt


def inspect_plan(
    library: Any, plan_path: Path, profiles: Sequence[ShapeProfile] = ()
) -> dict[str, Any]:
    """Layers of a built engine, through the engine inspector.

    Deserialising needs a CUDA driver and the GPU the plan is for, so this works where the engine
    can run: TensorRT for RTX 1.7 without a driver stops at cudaError 35, for the engine and for
    `get_engine_validity` alike.

    Args:
        library: the imported module.
        plan_path: the plan.
        profiles: shapes that it has to run; none are looked at if it is empty.

    Returns:
        `{"readable": True, "types": {...}, "device_memory_bytes": n}`, or
        `{"readable": False, "why": ...}`.

    Raises:
        InputError: it runs other shapes.
    """
    errors: list[str] = []
    runtime = library.Runtime(make_logger(library, errors))
    if hasattr(runtime, "engine_host_code_allowed"):
        runtime.engine_host_code_allowed = False
    engine = runtime.deserialize_cuda_engine(plan_path.read_bytes())
    if engine is None:
        return {"readable": False, "why": errors[0] if errors else "no reason given"}
    _require_profiles(engine, profiles, plan_path)
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(library.LayerInformationFormat.JSON)
    return {
        "readable": True,
        "types": _inspected_types(text),
        "device_memory_bytes": int(engine.device_memory_size_v2),
    }


def _require_profiles(
    engine: trt.ICudaEngine, profiles: Sequence[ShapeProfile], plan_path: Path
) -> None:
    """Raise InputError unless an engine has these profiles, for these inputs."""
    if not profiles:
        return
    names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    count = engine.num_optimization_profiles
    wanted = {(p.name, name): ends for p in profiles for name, ends in p.shapes.items()}
    differing = [f"{count} profiles"] if count != len(profiles) else []
    for index, profile in enumerate(profiles[: count if not differing else 0]):
        for name, ends in profile.shapes.items():
            found = (
                [
                    tuple(dims[axis] for axis in range(len(dims)))
                    for dims in engine.get_tensor_profile_shape(name, index)
                ]
                if name in names
                else "no such input"
            )
            if found != [ends.min, ends.opt, ends.max]:
                differing.append(f"{profile.name}, {name}: {found}")
    if differing:
        first = next(iter(wanted.items()))
        raise InputError(
            "This plan runs other shapes than those that were asked for.",
            where=plan_path,
            observed=differing[0],
            expected=f"{len(profiles)} profiles, as {first[0][1]}: {first[1]}",
            change="build it by the command that --trtexec prints with the same options",
        )


def _inspected_types(text: str) -> dict[str, int]:
    """Layers by type out of the inspector's JSON; 'unnamed' for those it gives only as a name."""
    layers = json.loads(text).get("Layers", [])
    types = (
        str(layer.get("LayerType", "unnamed")) if isinstance(layer, dict) else "unnamed"
        for layer in layers
    )
    return dict(Counter(types).most_common())
