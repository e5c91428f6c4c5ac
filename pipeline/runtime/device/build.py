"""The engine of a bundle, built on the board that is to run it, out of the graphs in the bundle.

Whatever needs the package onnx was done when the bundle was made: its record holds what the worker
process is to be told, once for a graph with the plugin's nodes and once for one without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.engine.build import run_plan
from pipeline.engine.plan import BUILT_PLUGIN, EnginePlan, check_memory, choose_workspace
from pipeline.engine.profiles import Limits
from pipeline.engine.standard import profile_for
from pipeline.engine.target import Target
from pipeline.engine.worker_protocol import WorkerRequest
from pipeline.errors import InputError
from pipeline.export.contract import DEFAULT_PROFILE
from pipeline.export.onnx_folder import OnnxFolder
from pipeline.export.record import read_export_record
from pipeline.gpu import capability_name
from pipeline.json_file import json_field, read_json_object
from pipeline.runtime.device.bundle import (
    BUNDLE_FILE,
    ENGINE_FOLDER,
    MODEL_FOLDER,
    PLUGIN_FOLDER,
)
from pipeline.runtime.device.preflight import Description, require_buffer

WITH_PLUGIN, WITHOUT_PLUGIN = "plugin", "function bodies"
_WHERE = "this machine"


def build_bundle(
    folder: Path,
    device: dict[str, Any],
    say: Callable[[str], None],
    *,
    plugin: Path | None = None,
    overwrite: bool = False,
    timeout_s: float = 7200.0,
) -> dict[str, Any]:
    """Build the engine of a bundle that was made from a checkpoint.

    Args:
        folder: the bundle; its files are those that were packed.
        device: what `describe` says of this machine.
        say: gets what the user should know.
        plugin: the block-skip library; None takes the one that was built or packed in the bundle.
        overwrite: replace an engine that is there.
        timeout_s: seconds after which the build is stopped.

    Returns:
        The engine's manifest.

    Raises:
        InputError: the bundle brings no graph, is for another GPU or a newer TensorRT, or the
            plugin or graph is refused.
        ResourceError: memory, disk or time ran out, or memory will.
        UsageError: there is an engine already.
    """
    library = _plugin_of(folder, plugin)
    plan = _plan(folder, library, timeout_s)
    said = [*_require_same(folder, plan, device), *plan.notes]
    said += check_memory(plan.target, plan.folder, plan.limits)
    workspace_bytes, workspace_notes = choose_workspace(None, plan.target.shares_memory)
    said += workspace_notes
    for line in said:
        say(line)
    work = replace(plan.work, workspace_bytes=workspace_bytes)
    plan = replace(plan, work=work, notes=tuple(said))
    return run_plan(plan, folder / ENGINE_FOLDER, overwrite=overwrite)


def check_build(folder: Path, device: dict[str, Any]) -> list[str]:
    """Whether the engine of a bundle can be built on a board: what is to be said of it.

    Args:
        folder: the bundle.
        device: what `describe` said of the board.

    Raises:
        InputError: the bundle is for another GPU or a newer TensorRT.
        ResourceError: there is too little memory, or no piece of it as large as the weights.
    """
    plan = _plan(folder, _plugin_of(folder, None), 0.0)
    said = _require_same(folder, plan, device)
    board = Description(device)
    available = board.free_bytes
    if available is None:
        return [*said, "not looked at: free memory, which the description does not say"]
    swap = json_field(board.memory, "swap_bytes", int, _WHERE, default=0) or 0
    return [*said, *check_memory(plan.target, plan.folder, plan.limits, (available, swap))]


def _plan(folder: Path, library: Path | None, timeout_s: float) -> EnginePlan:
    """What is to be built, out of the bundle's record."""
    path = folder / BUNDLE_FILE
    record = json_field(read_json_object(path), "build", dict, path, default=None)
    if record is None:
        raise InputError(
            "This bundle brings an engine, and no graph to build one from.",
            where=folder,
            change="build it where it was made: `skipcat bundle CHECKPOINT --device ...`",
        )
    model = (folder / MODEL_FOLDER).resolve()
    name = WITHOUT_PLUGIN if library is None else WITH_PLUGIN
    graph = json_field(json_field(record, "graphs", dict, path), name, dict, path)
    fields = json_field(graph, "work", dict, path)
    try:
        work = WorkerRequest.from_json(fields)
        limits = Limits(**json_field(record, "limits", dict, path))
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError("The build of this bundle is not readable.", where=path) from error
    work = replace(work, onnx_path=model / work.onnx_path.name, plugin=library)
    data = tuple(model / one for one in json_field(record, "weight_files", list, path))
    onnx = OnnxFolder(model, read_export_record(model), {}, work.block_skip_nodes, data)
    target = Target("tensorrt", work.compute_capability, "the bundle is for it")
    notes = tuple(json_field(graph, "notes", list, path))
    return EnginePlan(target, onnx, limits, work, timeout_s, notes)


def _plugin_of(folder: Path, given: Path | None) -> Path | None:
    """The library to build with; None where there is none."""
    if given is not None and not given.is_file():
        raise InputError(
            "The plugin library is missing.",
            where=given,
            change=f"build it first (sh {folder / PLUGIN_FOLDER}/build.sh), or leave --plugin out",
        )
    library = given or folder / PLUGIN_FOLDER / "lib" / BUILT_PLUGIN.name
    return library.resolve() if library.is_file() else None


def _require_same(folder: Path, plan: EnginePlan, device: dict[str, Any]) -> list[str]:
    """What to say of a board; raise where it is not one that the bundle is for, or too small."""
    board = Description(device)
    capability = board.gpu.get("compute_capability")
    wanted = plan.work.compute_capability
    if capability is not None and tuple(capability) != wanted:
        raise InputError(
            "This bundle is for another GPU.",
            where=folder,
            observed=capability_name(tuple(capability)),
            expected=capability_name(wanted),
            change="make a bundle with the --device that this board is",
        )
    require_buffer(plan.folder.weight_bytes, board, folder)
    version = device.get("tensorrt")
    if version is None:
        return ["not looked at: TensorRT, of which nothing is known"]
    known, graph = profile_for(str(version)), plan.folder.record.profile
    if known != graph and graph == DEFAULT_PROFILE:
        raise InputError(
            "This bundle's graph is for a newer TensorRT.",
            where=folder,
            observed=f"TensorRT {version}, which knows '{known}'",
            expected=f"one that knows '{graph}'",
            change="make the bundle with the --jetpack that this board has",
        )
    if known != graph:
        return [
            f"TensorRT {version} knows graphs whose cache is written in place, which are quicker: "
            "make the bundle with the --jetpack that this board has"
        ]
    return []
