"""`build_engine`: an ONNX folder in, an engine folder with its manifest out."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pipeline.artefact import copy_tokenizer, refuse_existing, staged_folder, write_json
from pipeline.engine.child import LOG_FILE, read_result, run_child, worker_command
from pipeline.engine.manifest import MANIFEST_FILE, make_manifest, target_record
from pipeline.engine.plugin_library import choose_plugin
from pipeline.engine.profiles import (
    DecodeForm,
    Limits,
    Profile,
    image_limits,
    make_limits,
    make_profiles,
)
from pipeline.engine.rtx import plugin_refused
from pipeline.engine.target import Target
from pipeline.engine.worker_protocol import REQUEST_FILE, RESULT_FILE, BuildRequest
from pipeline.errors import MissingPackageError, UsageError
from pipeline.export.onnx_folder import OnnxFolder, read_onnx_folder, require_float16
from pipeline.model.task import IMAGES

DEFAULT_TIMEOUT_S = 7200.0
# Measured on SmolLM2-135M with TensorRT for RTX 1.7, see docs/engine-size.md.
PLAN_PER_WEIGHT: dict[DecodeForm, float] = {"shared": 1.2, "separate": 2.1}
PEAK_PER_WEIGHT: dict[DecodeForm, float] = {"shared": 4.5, "separate": 6.7}
PEAK_BASE_BYTES = 220_000_000
GIBIBYTE = 1 << 30
PACKAGES = {
    "rtx": ("tensorrt_rtx", "tensorrt-rtx-cu13", "rtx"),
    "tensorrt": ("tensorrt", "tensorrt", "trt"),
}


@dataclass(frozen=True)
class EnginePlan:
    """Everything decided before the build starts; what `--dry-run` shows.

    Attributes:
        target: what to build for.
        folder: the checked ONNX folder.
        limits: batch, tokens per call, cache length.
        profiles: optimisation profiles, in order.
        plugin: absolute path of the plugin library, or None.
        embed: whether the block-skip kernels become part of the engine instead.
        notes: choices the user should know about.
    """

    target: Target
    folder: OnnxFolder
    limits: Limits
    profiles: tuple[Profile, ...]
    plugin: Path | None
    embed: bool
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `--dry-run --json`."""
        return {
            "target": target_record(self.target),
            "onnx": str(self.folder.onnx_path),
            "onnx_bytes": self.folder.weight_bytes,
            "expected_peak_bytes": expected_peak_bytes(
                self.folder.weight_bytes, self.limits.decode
            ),
            "block_skip_nodes": self.folder.block_skip_nodes,
            "plugin": None if self.plugin is None else str(self.plugin),
            "embed_kernels": self.embed,
            "decode_profile": self.limits.decode,
            "profiles": [profile.to_json() for profile in self.profiles],
            "notes": list(self.notes),
        }


def build_engine(
    onnx_folder: Path,
    output: Path,
    target: Target,
    *,
    max_batch: int = 1,
    max_prefill: int = 1024,
    plugin: Path | None = None,
    embed: bool = False,
    overwrite: bool = False,
    decode: DecodeForm | None = None,
    workspace_bytes: int | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> dict[str, Any]:
    """Build a TensorRT engine out of an exported ONNX folder.

    Args:
        onnx_folder: what `skipcat export --dtype float16` wrote.
        output: folder to write: `engine.plan`, `manifest.json`, `build.log`.
        target: what to build for, from `target.resolve_target`.
        max_batch: most sequences at once.
        max_prefill: most tokens of one call; capped by the cache length.
        plugin: block-skip plugin library, for standard TensorRT only; None takes the one that
            `make plugin` built, if it did.
        embed: put the block-skip kernels into the engine instead (TensorRT 10.9 or newer).
        overwrite: replace `output` if it exists.
        decode: see `profiles.Limits`; None takes `shared` for RTX and `separate` otherwise.
        workspace_bytes: most scratch memory a kernel may use; None leaves TensorRT's default.
        timeout_s: seconds after which the build is stopped.

    Returns:
        The manifest.

    Raises:
        InputError: the folder, plugin or graph is refused.
        MissingPackageError: the TensorRT flavour is not installed.
        ResourceError: memory, disk or time ran out.
        UsageError: `output` exists, a limit is below 1, or the target needs no engine.
    """
    plan = plan_engine(
        onnx_folder,
        target,
        max_batch=max_batch,
        max_prefill=max_prefill,
        plugin=plugin,
        embed=embed,
        decode=decode,
    )
    refuse_existing(output, overwrite=overwrite)
    return run_build(plan, output, overwrite, workspace_bytes, timeout_s)


def plan_engine(
    onnx_folder: Path,
    target: Target,
    *,
    max_batch: int = 1,
    max_prefill: int = 1024,
    plugin: Path | None = None,
    embed: bool = False,
    decode: DecodeForm | None = None,
) -> EnginePlan:
    """Check everything that can be checked without TensorRT, and decide the profiles.

    Raises:
        InputError: the folder or plugin is refused.
        MissingPackageError: the TensorRT flavour is not installed.
        UsageError: a limit below 1, a target that needs no engine, or `plugin` and `embed`.
    """
    require_engine_target(target)
    if plugin is not None and embed:
        raise UsageError(
            "The kernels come from a library or become part of the engine, not both.",
            change="leave out --plugin or --embed-kernels",
        )
    if (plugin is not None or embed) and target.flavour == "rtx":
        raise plugin_refused()
    folder = read_onnx_folder(onnx_folder)
    require_float16(folder)
    require_package(target)
    form: DecodeForm = decode or ("shared" if target.flavour == "rtx" else "separate")
    images = folder.record.task == IMAGES
    if images and decode is not None:
        raise UsageError("An image classifier has no decode profile.", where="--decode")
    limits = (
        image_limits(max_batch)
        if images
        else make_limits(max_batch, max_prefill, folder.record.max_length, form)
    )
    library, plugin_note = None, ""
    if embed:
        plugin_note = "block-skip kernels: compiled into the engine"
    elif target.flavour != "rtx" and (plugin is not None or folder.block_skip_nodes):
        library, plugin_note = choose_plugin(plugin)
    return EnginePlan(
        target=target,
        folder=folder,
        limits=limits,
        profiles=tuple(make_profiles(folder.inputs, limits)),
        plugin=library,
        embed=embed,
        notes=(
            *(() if images else prefill_notes(limits, max_prefill)),
            *memory_notes(target, folder, form),
            *filter(None, (plugin_note,)),
        ),
    )


def prefill_notes(limits: Limits, wanted: int) -> list[str]:
    """What to say when the cache is shorter than the calls that were asked for."""
    if limits.max_prefill == wanted:
        return []
    return [f"--max-prefill lowered from {wanted} to {limits.max_prefill}, the cache length"]


def memory_notes(target: Target, folder: OnnxFolder, decode: DecodeForm) -> list[str]:
    """A warning when the build is likely to need more memory than is free; RTX only, measured."""
    available = psutil.virtual_memory().available
    peak = expected_peak_bytes(folder.weight_bytes, decode)
    if target.flavour != "rtx" or peak <= available:
        return []
    return [
        f"building may run out of memory: about {peak / GIBIBYTE:.1f} GiB expected, "
        f"{available / GIBIBYTE:.1f} GiB free"
    ]


def expected_peak_bytes(weight_bytes: int, decode: DecodeForm) -> int:
    """Largest resident size of the worker for a graph with `weight_bytes` of weights, roughly."""
    return PEAK_BASE_BYTES + int(weight_bytes * PEAK_PER_WEIGHT[decode])


def run_build(
    plan: EnginePlan, output: Path, overwrite: bool, workspace_bytes: int | None, timeout_s: float
) -> dict[str, Any]:
    """Run the worker on a plan and write the engine folder."""
    required = int(plan.folder.weight_bytes * PLAN_PER_WEIGHT[plan.limits.decode])
    with staged_folder(output, overwrite=overwrite, required_bytes=required) as staging:
        request = make_request(plan, staging.resolve(), workspace_bytes)
        request_path = staging / REQUEST_FILE
        write_json(request_path, request.to_json())
        end = run_child(worker_command(request_path), staging / LOG_FILE, timeout_s)
        result = read_result(end, staging, timeout_s)
        if plan.plugin is not None:
            # The engine cannot be loaded without it, so the folder carries it.
            shutil.copy(plan.plugin, staging)
        manifest = make_manifest(plan.target, plan.limits, plan.folder, request, result, plan.notes)
        write_json(staging / MANIFEST_FILE, manifest)
        copy_tokenizer(plan.folder.path, staging)
        for name in (REQUEST_FILE, RESULT_FILE):
            (staging / name).unlink()
    return manifest


def make_request(plan: EnginePlan, staging: Path, workspace_bytes: int | None) -> BuildRequest:
    """What the worker is told."""
    capability = plan.target.compute_capability
    assert capability is not None, "require_engine_target lets no cpu target through"
    return BuildRequest(
        flavour=plan.target.flavour,
        compute_capability=capability,
        onnx_path=plan.folder.onnx_path,
        staging=staging,
        profiles=plan.profiles,
        shared_weights=plan.limits.decode == "shared",
        workspace_bytes=workspace_bytes,
        plugin=plan.plugin,
        block_skip_nodes=plan.folder.block_skip_nodes,
        onnx_profile=plan.folder.record.profile,
        embed=plan.embed,
        dequantized=plan.folder.dequantized,
        few_bit_nodes=plan.folder.quantized_nodes,
    )


def require_engine_target(target: Target) -> None:
    """Raise UsageError for the target `cpu`, which runs the ONNX folder as it is."""
    if target.flavour == "cpu":
        raise UsageError(
            "The target 'cpu' needs no engine: ONNX Runtime runs the ONNX folder as it is.",
            change="skipcat run ONNX_FOLDER, or name a GPU with --target",
        )


def require_package(target: Target) -> None:
    """Raise MissingPackageError when the flavour's Python package is not installed."""
    module, package, extra = PACKAGES[target.flavour]
    if importlib.util.find_spec(module) is None:
        raise MissingPackageError(package, extra, f"build an engine for {target}")
