"""`manifest.json`: what an engine is, and whether it belongs to this library, GPU and ONNX file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artefact import sha256_of_file
from pipeline.engine.plugin_library import plugin_record
from pipeline.engine.profiles import Limits, Profile
from pipeline.engine.target import Capability, Target, capability_name
from pipeline.engine.worker_protocol import PLAN_FILE, BuildRequest, BuildResult
from pipeline.errors import InputError
from pipeline.export.contract import GRAPH_FILE
from pipeline.export.onnx_folder import OnnxFolder
from pipeline.model.task import TASKS
from pipeline.provenance import provenance

SCHEMA = 1
MANIFEST_FILE = "manifest.json"
BUILD_AGAIN = "build the engine again with skipcat engine"
REQUIRED_FIELDS = ("target", "tensorrt_version", "profiles", "block_skip", "plan", "onnx")


@dataclass(frozen=True)
class Runtime:
    """The library that is about to load an engine, and the GPU under it."""

    flavour: str
    version: str
    compute_capability: Capability


def make_manifest(
    target: Target,
    limits: Limits,
    folder: OnnxFolder,
    request: BuildRequest,
    result: BuildResult,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The manifest of the plan that lies in `request.staging`."""
    plan = request.staging / PLAN_FILE
    return {
        "schema": SCHEMA,
        "target": target_record(target),
        "tensorrt_version": result.library_version,
        **limits_record(limits),
        "workspace_bytes": request.workspace_bytes,
        "profiles": [profile.to_json() for profile in request.profiles],
        "block_skip": block_skip_record(request, result),
        "few_bits": result.few_bits,
        "layer_types": result.layer_types,
        "engine_layers": result.engine_layers,
        "plan": {"bytes": plan.stat().st_size, "sha256": sha256_of_file(plan)},
        "onnx": onnx_record(folder),
        "build": {
            "parse_seconds": round(result.parse_seconds, 3),
            "build_seconds": round(result.build_seconds, 3),
            "peak_memory_bytes": result.peak_memory_bytes,
        },
        "notes": [*notes, *result.notes],
        "provenance": provenance(),
    }


def limits_record(limits: Limits) -> dict[str, Any]:
    """What the engine can run; of tokens only where it takes tokens."""
    record: dict[str, Any] = {"limits": {"max_batch": limits.max_batch}}
    if limits.max_length:
        record["limits"] |= {"max_prefill": limits.max_prefill, "max_length": limits.max_length}
        record["decode_profile"] = limits.decode
    return record


def target_record(target: Target) -> dict[str, Any]:
    """Flavour, capability and reason."""
    capability = target.compute_capability
    return {
        "flavour": target.flavour,
        "compute_capability": None if capability is None else list(capability),
        "reason": target.reason,
    }


def block_skip_record(request: BuildRequest, result: BuildResult) -> dict[str, Any]:
    """The path the block-skip nodes took, and the plugin if it was that."""
    uses_plugin = result.block_skip["path"] == "plugin" and request.plugin is not None
    plugin = plugin_record(request.plugin) if uses_plugin and request.plugin else None
    return {**result.block_skip, "plugin": plugin}


def onnx_record(folder: OnnxFolder) -> dict[str, Any]:
    """What identifies the ONNX folder: the graph's hash alone would not tell two models apart."""
    record = folder.record
    own = TASKS[record.task].record_fields
    return {
        "sha256": record.onnx_sha256,
        "data_sha256": folder.data_sha256(),
        "task": record.task,
        "profile": record.profile,
        "dtype": record.dtype,
        **{name: getattr(record, name) for name in own},
    }


def check_manifest(
    engine_folder: Path, onnx_folder: Path | None = None, runtime: Runtime | None = None
) -> dict[str, Any]:
    """Read a manifest and refuse a pairing that could not work.

    Args:
        engine_folder: holds `engine.plan` and `manifest.json`.
        onnx_folder: when given, must be the one the engine was built from.
        runtime: when given, must be what the engine was built for.

    Returns:
        The manifest.

    Raises:
        InputError: something is missing, changed, or does not belong together.
    """
    manifest = read_manifest(engine_folder)
    require_plan(engine_folder / PLAN_FILE, manifest["plan"])
    if onnx_folder is not None:
        require_onnx(engine_folder, manifest["onnx"], onnx_folder)
    if runtime is not None:
        require_runtime(engine_folder, manifest, runtime)
    return manifest


def read_manifest(engine_folder: Path) -> dict[str, Any]:
    """Parse `manifest.json`.

    Raises:
        InputError: missing, not JSON, or of another schema.
    """
    path = engine_folder / MANIFEST_FILE
    if not path.is_file():
        raise InputError(
            "This is not an engine folder.",
            where=engine_folder,
            expected=MANIFEST_FILE,
            change=BUILD_AGAIN,
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError("This file is not JSON.", where=path, observed=error) from error
    require_schema(manifest, path)
    fields: dict[str, Any] = manifest
    return fields


def require_schema(manifest: Any, path: Path) -> None:
    """Raise InputError unless the manifest is of the schema that this version writes."""
    known = isinstance(manifest, dict) and manifest.get("schema") == SCHEMA
    missing = [name for name in REQUIRED_FIELDS if not known or name not in manifest]
    if missing:
        raise InputError(
            "This manifest was written by another version of skipcat, or is damaged.",
            where=path,
            observed="missing: " + ", ".join(missing) if known else "another schema",
            expected=f"schema {SCHEMA}",
            change=BUILD_AGAIN,
        )


def require_plan(path: Path, record: dict[str, Any]) -> None:
    """Raise InputError when the plan is missing or not the one that the manifest describes."""
    if not path.is_file():
        raise InputError("The engine's plan is missing.", where=path, change=BUILD_AGAIN)
    if path.stat().st_size != record["bytes"]:
        raise mismatch("plan size", path, path.stat().st_size, record["bytes"])
    digest = sha256_of_file(path)
    if digest != record["sha256"]:
        raise mismatch("plan hash", path, digest, record["sha256"])


def require_onnx(engine_folder: Path, record: dict[str, Any], onnx_folder: Path) -> None:
    """Raise InputError when the engine was built from another graph or other weights."""
    hashes = {GRAPH_FILE: record["sha256"], **record["data_sha256"]}
    for name, expected in hashes.items():
        path = onnx_folder / name
        if not path.is_file():
            raise InputError(
                f"{name}, which the engine was built from, is missing.", where=onnx_folder
            )
        digest = sha256_of_file(path)
        if digest != expected:
            raise mismatch(f"hash of {name}", engine_folder, digest, expected)


def require_runtime(engine_folder: Path, manifest: dict[str, Any], runtime: Runtime) -> None:
    """Raise InputError when the engine is for another flavour, version or GPU."""
    target = manifest["target"]
    built_for = tuple(target["compute_capability"])
    checks = (
        ("TensorRT flavour", runtime.flavour, target["flavour"]),
        ("TensorRT version", runtime.version, manifest["tensorrt_version"]),
        ("GPU", capability_name(runtime.compute_capability), capability_name(built_for)),
    )
    for what, here, expected in checks:
        if here != expected:
            raise mismatch(what, engine_folder, here, expected)


def mismatch(what: str, where: Path, observed: object, expected: object) -> InputError:
    """The error for an engine that does not belong to what it is about to be used with."""
    return InputError(
        f"This engine does not fit: another {what}.",
        where=where,
        observed=observed,
        expected=expected,
        change=BUILD_AGAIN,
    )


def read_profiles(manifest: dict[str, Any]) -> list[Profile]:
    """The manifest's optimisation profiles, in the engine's order."""
    return [Profile.from_json(entry) for entry in manifest["profiles"]]
