"""What a board builds an engine from: the graphs as its TensorRT must be given them, and sources.

A board has no package onnx, so every graph that it may need is written here: with the plugin's
nodes, and with function bodies where it has no plugin. They share the weights.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.artefact import write_json, write_text
from pipeline.bundle.program import sources_of
from pipeline.engine.plan import (
    BUILT_PLUGIN,
    EnginePlan,
    EngineRequest,
    form_of_cache,
    plan_engine,
)
from pipeline.engine.standard import graph_to_parse
from pipeline.errors import InputError
from pipeline.export.contract import PLUGIN_OPS, RECORD_FILE
from pipeline.export.export import export_folder
from pipeline.export.request import ExportRequest
from pipeline.runtime.device.build import WITH_PLUGIN, WITHOUT_PLUGIN

_ROOT = Path(__file__).resolve().parents[2]
_PLUGIN_GRAPH, _BODY_GRAPH = "model.plugin.onnx", "model.bodies.onnx"
_SOURCE_KINDS = (".cu", ".cuh", ".cpp", ".h", ".txt")
_BUILD_PLUGIN = "tools/build_plugin.py"
_BUILD_SCRIPT = f"""#!/bin/sh
# Compile the plugin library for this board's own GPU, into lib/, where `build` looks for it.
cd "$(dirname "$0")" && exec python3 {_BUILD_PLUGIN} --work build --output lib "$@"
"""
_ELF, _AARCH64 = b"\x7fELF", 183
_MACHINE = slice(18, 20)  # of the ELF header


def prepare_model(
    checkpoint: Path, model: Path, wanted: ExportRequest, request: EngineRequest, version: str
) -> dict[str, Any]:
    """Export a checkpoint and write the graphs that a board builds from.

    Args:
        checkpoint: a compressed or a plain Hugging Face folder.
        model: folder to write: an ONNX folder with further graphs in it.
        wanted: what to export.
        request: what the engine must be able to run.
        version: of the board's TensorRT.

    Returns:
        What `skipcat-device build` reads in bundle.json.

    Raises:
        PipelineError: the checkpoint cannot be exported, or not built from.
    """
    record = export_folder(checkpoint, model, wanted)
    record.pop("seconds")  # the same bundle twice has the same bytes
    write_json(model / RECORD_FILE, record)
    plan = plan_engine(model, request, elsewhere=True)
    graphs = {WITHOUT_PLUGIN: _prepare_graph(plan, model / _BODY_GRAPH, version, None)}
    if plan.folder.plugin_nodes:
        library = Path(BUILT_PLUGIN.name)
        graphs[WITH_PLUGIN] = _prepare_graph(plan, model / _PLUGIN_GRAPH, version, library)
    return {
        "compute_capability": list(plan.work.compute_capability),
        "tensorrt": version,
        "limits": vars(plan.limits),
        "weight_files": [path.name for path in plan.folder.data_files],
        "graphs": graphs,
    }


def _prepare_graph(
    plan: EnginePlan, path: Path, version: str, library: Path | None
) -> dict[str, Any]:
    """Write the graph that a TensorRT must be given; what its worker is to be told.

    Args:
        plan: of the exported graph, which is given as it is where it will do.
        path: of the graph to write.
        version: of TensorRT.
        library: name of the plugin library that it is for; None for none.
    """
    onnx_profile, inputs = form_of_cache(plan.folder, library)
    profiles = tuple(plan.limits.profiles_of(inputs))
    work = replace(plan.work, plugin=library, onnx_profile=onnx_profile, profiles=profiles)
    ops = set(PLUGIN_OPS) if library else set()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as aside:
        work, written, notes = graph_to_parse(work, Path(aside).resolve(), version, ops)
        if written != work.onnx_path:
            shutil.copyfile(written, path)
            work = replace(work, onnx_path=path)
    relative = replace(work, onnx_path=Path(work.onnx_path.name), prepared=True)
    return {"work": relative.to_json(), "notes": [*plan.notes, *notes]}


def copy_plugin_sources(folder: Path, library: Path | None) -> None:
    """Write what compiles the plugin library on a board, and the library where there is one.

    Args:
        folder: to write.
        library: compiled for that board; None for none.

    Raises:
        InputError: the library is not for such a machine.
    """
    if library is not None:
        _require_aarch64(library)
    modules = sources_of([_ROOT / _BUILD_PLUGIN])
    kernels = {
        path
        for path in (_ROOT / "trt_plugins").rglob("*")
        if path.suffix in _SOURCE_KINDS and "lib" not in path.parts
    }
    _copy_all(sorted(modules | kernels), folder)
    write_text(folder / "build.sh", _BUILD_SCRIPT)
    if library is not None:
        target = folder / "lib" / BUILT_PLUGIN.name
        target.parent.mkdir()
        shutil.copyfile(library, target)


def _copy_all(sources: Sequence[Path], folder: Path) -> None:
    """Copy files of this checkout to the same places below a folder."""
    for source in sources:
        target = folder / source.relative_to(_ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def _require_aarch64(library: Path) -> None:
    with library.open("rb") as file:
        header = file.read(_MACHINE.stop)
    machine = int.from_bytes(header[_MACHINE], "little")
    if header[: len(_ELF)] != _ELF or machine != _AARCH64:
        raise InputError(
            "This plugin library is not for a Jetson.",
            where=library,
            observed=f"ELF machine {machine}" if header.startswith(_ELF) else "no ELF file",
            expected=f"ELF machine {_AARCH64}, aarch64",
            change="take one that `make plugin` built on such a board, or leave --plugin out: the "
            "bundle has the sources, and a script that compiles them there",
        )
