"""`build_engine`: an ONNX folder in, an engine folder with its manifest out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pipeline.artefact import copy_tokenizer, refuse_existing, staged_folder, write_json
from pipeline.child_process import run_to_end
from pipeline.engine.child import LOG_FILE, read_result, worker_command
from pipeline.engine.manifest import MANIFEST_FILE, make_manifest
from pipeline.engine.plan import EnginePlan, EngineRequest, plan_engine
from pipeline.engine.profiles import DecodeForm
from pipeline.engine.worker_protocol import REQUEST_FILE, RESULT_FILE

# Measured on SmolLM2-135M with TensorRT for RTX 1.7, see docs/engine-size.md.
_PLAN_PER_WEIGHT: dict[DecodeForm, float] = {"shared": 1.2, "separate": 2.1}


def build_engine(
    onnx_folder: Path, output: Path, request: EngineRequest, *, overwrite: bool = False
) -> dict[str, Any]:
    """Build a TensorRT engine out of an exported ONNX folder.

    Args:
        onnx_folder: what `skipcat export --dtype float16` wrote.
        output: folder to write: `engine.plan`, `manifest.json`, `build.log`.
        request: the target, and what the engine must be able to run.
        overwrite: replace `output` if it exists.

    Returns:
        The manifest.

    Raises:
        InputError: the folder, plugin or graph is refused.
        MissingPackageError: the TensorRT flavour is not installed.
        ResourceError: memory, disk or time ran out.
        UsageError: `output` exists, a limit is below 1, or the target needs no engine.
    """
    plan = plan_engine(onnx_folder, request)
    refuse_existing(output, overwrite=overwrite)
    return run_plan(plan, output, overwrite=overwrite)


def run_plan(plan: EnginePlan, output: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Run the worker on a plan and write the engine folder; its manifest.

    Raises:
        InputError: TensorRT refuses the plugin or graph.
        ResourceError: memory, disk or time ran out.
        UsageError: `output` exists.
    """
    required = int(plan.folder.weight_bytes * _PLAN_PER_WEIGHT[plan.limits.decode])
    with staged_folder(output, overwrite=overwrite, required_bytes=required) as staging:
        request_path = staging.resolve() / REQUEST_FILE
        write_json(request_path, plan.work.to_json())
        end = run_to_end(worker_command(request_path), staging / LOG_FILE, plan.timeout_s)
        result = read_result(end, staging, plan.timeout_s)
        if plan.work.plugin is not None:
            # The engine cannot be loaded without it, so the folder carries it.
            shutil.copy(plan.work.plugin, staging)
        manifest = make_manifest(plan, result, staging)
        write_json(staging / MANIFEST_FILE, manifest)
        copy_tokenizer(plan.folder.path, staging)
        for name in (REQUEST_FILE, RESULT_FILE):
            (staging / name).unlink()
    return manifest
