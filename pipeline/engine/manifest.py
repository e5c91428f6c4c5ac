"""`manifest.json`: what an engine is, and whether it belongs to this library, GPU and ONNX file."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artefact import sha256_of_file
from pipeline.engine.profiles import Limits, ShapeProfile
from pipeline.engine.worker_protocol import PLAN_FILE, WorkerResult
from pipeline.errors import InputError
from pipeline.export.contract import BLOCK_SKIP_OPS, DOMAIN, GRAPH_FILE, OP_VERSION
from pipeline.gpu import Capability, capability_name
from pipeline.json_file import json_field, read_json_object
from pipeline.model.task import TASKS
from pipeline.provenance import provenance

if TYPE_CHECKING:
    from pipeline.engine.plan import EnginePlan
    from pipeline.export.onnx_folder import OnnxFolder

_SCHEMA = 1
MANIFEST_FILE = "manifest.json"
_BUILD_AGAIN = "build the engine again with skipcat engine"
_REQUIRED_FIELDS: dict[str, type] = {
    "target": dict, "tensorrt_version": str, "profiles": list, "block_skip": dict, "plan": dict,
    "onnx": dict,
}  # fmt: skip
# Within them, in an engine that is to be run.
_INNER_FIELDS: dict[str, dict[str, type]] = {
    "target": {"flavour": str, "compute_capability": list},
    "plan": {"bytes": int, "sha256": str},
    "onnx": {"sha256": str, "data_sha256": dict},
}
_OPTIONAL_FIELDS: dict[str, dict[str, type]] = {
    "limits": {"max_batch": int, "max_prefill": int, "max_length": int},
    "onnx": {"task": str, "profile": str, "dtype": str, "coded": list}
    | {name: kind for row in TASKS.values() for name, kind in row.record_fields.items()},
    "block_skip": {"plugin": dict},
}


@dataclass(frozen=True)
class EngineRuntime:
    """The library that is about to load an engine, and the GPU under it."""

    flavour: str
    version: str
    compute_capability: Capability


def make_manifest(plan: EnginePlan, result: WorkerResult, staging: Path) -> dict[str, Any]:
    """The manifest of the engine that lies in `staging`."""
    engine = staging / PLAN_FILE
    return {
        "schema": _SCHEMA,
        "target": plan.target.to_json(),
        "tensorrt_version": result.library_version,
        **_limits_record(plan.limits),
        "workspace_bytes": plan.work.workspace_bytes,
        "profiles": [profile.to_json() for profile in plan.work.profiles],
        "block_skip": _block_skip_record(plan.work.plugin, result),
        "few_bits": result.few_bits,
        "latent_attention": result.latent_attention,
        **({"cache_write": result.cache_write} if result.cache_write else {}),
        **({"int8": result.int8} if result.int8 else {}),
        "layer_types": result.layer_types,
        "engine_layers": result.engine_layers,
        "plan": {"bytes": engine.stat().st_size, "sha256": sha256_of_file(engine)},
        "onnx": _onnx_record(plan.folder, plan.work.onnx_profile),
        "build": {
            "parse_seconds": round(result.parse_seconds, 3),
            "build_seconds": round(result.build_seconds, 3),
            "peak_memory_bytes": result.peak_memory_bytes,
        },
        "notes": [*plan.notes, *result.notes],
        "provenance": provenance(),
    }


def _limits_record(limits: Limits) -> dict[str, Any]:
    """What the engine can run; of tokens only where it takes tokens."""
    record: dict[str, Any] = {"limits": {"max_batch": limits.max_batch}}
    if limits.max_length:
        record["limits"] |= {"max_prefill": limits.max_prefill, "max_length": limits.max_length}
        record["decode_profile"] = limits.decode
    return record


def _block_skip_record(plugin: Path | None, result: WorkerResult) -> dict[str, Any]:
    """The path the block-skip nodes took, and the plugin if it was that."""
    ways = (result.block_skip, result.latent_attention, result.cache_write)
    used = plugin if "plugin" in [way.get("path") for way in ways] else None
    return {**result.block_skip, "plugin": None if used is None else _plugin_record(used)}


def _onnx_record(folder: OnnxFolder, profile: str) -> dict[str, Any]:
    """What identifies the ONNX folder: the graph's hash alone would not tell two models apart.

    Args:
        folder: that the engine was built from.
        profile: whose form the graph has that TensorRT was given.
    """
    record = folder.record
    own = TASKS[record.task].record_fields
    return {
        "sha256": record.onnx_sha256,
        "data_sha256": folder.data_sha256(),
        "task": record.task,
        "profile": profile,
        "dtype": record.dtype,
        **{name: getattr(record, name) for name in own},
        **({"coded": list(record.coded)} if record.coded else {}),
    }


def check_manifest(
    engine_folder: Path, onnx_folder: Path | None = None, runtime: EngineRuntime | None = None
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
    for name, fields in _INNER_FIELDS.items():
        for inner, kind in fields.items():
            json_field(manifest[name], inner, kind, f"{engine_folder / MANIFEST_FILE}: {name}")
    _require_plan(engine_folder / PLAN_FILE, manifest["plan"])
    if onnx_folder is not None:
        _require_onnx(engine_folder, manifest["onnx"], onnx_folder)
    if runtime is not None:
        _require_runtime(engine_folder, manifest, runtime)
    return manifest


def read_manifest(engine_folder: Path) -> dict[str, Any]:
    """Parse `manifest.json`.

    Raises:
        InputError: missing, not JSON, of another schema, or with a field of another type.
    """
    path = engine_folder / MANIFEST_FILE
    if not path.is_file():
        raise InputError(
            "This is not an engine folder.",
            where=engine_folder,
            expected=MANIFEST_FILE,
            change=_BUILD_AGAIN,
        )
    manifest = read_json_object(path, change=_BUILD_AGAIN)
    _require_schema(manifest, path)
    _require_types(manifest, path)
    return manifest


def _require_types(manifest: dict[str, Any], path: Path) -> None:
    """Raise InputError for a field that stages read and that holds something else."""
    for name, kind in _REQUIRED_FIELDS.items():
        json_field(manifest, name, kind, path)
    for name, fields in (*_INNER_FIELDS.items(), *_OPTIONAL_FIELDS.items()):
        section: dict[str, Any] = json_field(manifest, name, dict, path, default=None) or {}
        for inner, inner_kind in fields.items():
            value = json_field(section, inner, inner_kind, f"{path}: {name}", default=None)
            if isinstance(value, int) and value < 0:
                raise mismatch(f"{name}, {inner}", path, value, "at least 0")
    capability = manifest["target"].get("compute_capability") or []
    if any(type(part) is not int for part in capability):
        raise mismatch("GPU", path, capability, "whole numbers")
    for entry in manifest["profiles"]:
        _require_profile(entry, path)


def _require_profile(entry: Any, path: Path) -> None:
    """Raise InputError unless an optimisation profile names a range for each input."""
    try:
        profile = ShapeProfile.from_json(entry)
        sizes = [n for ends in profile.shapes.values() for end in astuple(ends) for n in end]
        fits = all(type(size) is int and size >= 0 for size in sizes)
    except (AttributeError, KeyError, TypeError):
        fits = False
    if not fits:
        raise InputError(
            "An optimisation profile of this manifest is wrong.",
            where=path,
            expected="a name, and min, opt and max of every input",
            change=_BUILD_AGAIN,
        )


def _require_schema(manifest: dict[str, Any], path: Path) -> None:
    """Raise InputError unless the manifest is of the schema that this version writes."""
    known = manifest.get("schema") == _SCHEMA
    missing = [name for name in _REQUIRED_FIELDS if not known or name not in manifest]
    if missing:
        raise InputError(
            "This manifest was written by another version of skipcat, or is damaged.",
            where=path,
            observed="missing: " + ", ".join(missing) if known else "another schema",
            expected=f"schema {_SCHEMA}",
            change=_BUILD_AGAIN,
        )


def _require_plan(path: Path, record: dict[str, Any]) -> None:
    """Raise InputError when the plan is missing or not the one that the manifest describes."""
    if not path.is_file():
        raise InputError("The engine's plan is missing.", where=path, change=_BUILD_AGAIN)
    if path.stat().st_size != record["bytes"]:
        raise mismatch("plan size", path, path.stat().st_size, record["bytes"])
    digest = sha256_of_file(path)
    if digest != record["sha256"]:
        raise mismatch("plan hash", path, digest, record["sha256"])


def _require_onnx(engine_folder: Path, record: dict[str, Any], onnx_folder: Path) -> None:
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


def _require_runtime(engine_folder: Path, manifest: dict[str, Any], runtime: EngineRuntime) -> None:
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
        change=_BUILD_AGAIN,
    )


def _plugin_record(path: Path) -> dict[str, Any]:
    """The manifest's description of the library the engine needs at run time."""
    return {
        "library": path.name,
        "names": list(BLOCK_SKIP_OPS),
        "sha256": sha256_of_file(path),
        "version": str(OP_VERSION),
        "namespace": DOMAIN,
    }
