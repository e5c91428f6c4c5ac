"""What is decided about an engine before TensorRT is touched: checked, and shown by `--dry-run`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.engine.growing_cache import Shapes, growing_inputs
from pipeline.engine.profiles import DecodeForm, Limits
from pipeline.engine.target import Target
from pipeline.engine.worker_protocol import WorkerRequest
from pipeline.errors import InputError, ResourceError, UsageError
from pipeline.export.contract import COMPAT
from pipeline.export.onnx_folder import OnnxFolder, read_onnx_folder
from pipeline.memory import free_memory, swap_advice
from pipeline.model.task import adapter_of

# Measured on SmolLM2-135M with TensorRT for RTX 1.7, see docs/engine-size.md.
_PEAK_PER_WEIGHT: dict[DecodeForm, float] = {"shared": 4.5, "separate": 6.7}
_PEAK_BASE_BYTES = 220_000_000
# What a build cannot do without: the weights, and the plan that holds them.
_LEAST_PER_WEIGHT = 2
_MEBIBYTE = 1 << 20
_WORKSPACE_OF_SHARED, _LEAST_WORKSPACE_BYTES = 4, 64 << 20
BUILT_PLUGIN = (
    Path(__file__).parents[2] / "trt_plugins" / "block_skip" / "lib" / "libskipcat_block_skip.so"
)


@dataclass(frozen=True)
class EngineRequest:
    """What the user asks for.

    Attributes:
        target: what to build for, from `target.resolve_target`.
        max_batch: most sequences at once.
        max_prefill: most tokens of one call; capped by the cache length.
        plugin: block-skip plugin library, for standard TensorRT only; None takes the one that
            `make plugin` built, if it did.
        embed: put the block-skip kernels into the engine instead (TensorRT 10.9 or newer).
        decode: see `profiles.Limits`; None takes `shared` for RTX and where the GPU shares the
            CPU's memory, and `separate` otherwise.
        workspace_bytes: most scratch memory a kernel may use; None leaves TensorRT's default, or
            takes a quarter of what is free where the GPU shares the CPU's memory.
        timeout_s: seconds after which the build is stopped.
    """

    target: Target
    max_batch: int = 1
    max_prefill: int = 1024
    plugin: Path | None = None
    embed: bool = False
    decode: DecodeForm | None = None
    workspace_bytes: int | None = None
    timeout_s: float = 7200.0

    def check(self) -> None:
        """Refuse what no folder could make right.

        Raises:
            InputError: a plugin for an RTX target.
            UsageError: a target that needs no engine, or `plugin` and `embed`.
        """
        if self.target.flavour == "cpu":
            raise UsageError(
                "The target 'cpu' needs no engine: ONNX Runtime runs the ONNX folder as it is.",
                change="skipcat run ONNX_FOLDER, or name a GPU with --target",
            )
        if self.plugin is not None and self.embed:
            raise UsageError(
                "The kernels come from a library or become part of the engine, not both.",
                change="leave out --plugin or --embed-kernels",
            )
        if (self.plugin is not None or self.embed) and self.target.flavour == "rtx":
            raise InputError(
                "TensorRT for RTX takes no plugins on Linux: parsing a node that resolves to one "
                "aborts the process.",
                change="leave --plugin and --embed-kernels out (function bodies are inlined into "
                "native layers), or use --target tensorrt",
            )


@dataclass(frozen=True)
class EnginePlan:
    """Everything decided before the build starts.

    Attributes:
        target: what to build for.
        folder: the checked ONNX folder.
        limits: batch, tokens per call, cache length.
        work: what the worker will be told.
        timeout_s: seconds after which the build is stopped.
        notes: choices the user should know about.
    """

    target: Target
    folder: OnnxFolder
    limits: Limits
    work: WorkerRequest
    timeout_s: float
    notes: tuple[str, ...]

    @staticmethod
    def peak_bytes(weight_bytes: int, decode: DecodeForm) -> int:
        """Largest resident size of the worker, roughly, by the bytes of the graph's weights."""
        return _PEAK_BASE_BYTES + int(weight_bytes * _PEAK_PER_WEIGHT[decode])

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `--dry-run --json`."""
        plugin, weight_bytes = self.work.plugin, self.folder.weight_bytes
        return {
            "target": self.target.to_json(),
            "onnx": str(self.folder.onnx_path),
            "onnx_bytes": weight_bytes,
            "expected_peak_bytes": self.peak_bytes(weight_bytes, self.limits.decode),
            "block_skip_nodes": self.folder.block_skip_nodes,
            "cache_nodes": self.folder.cache_nodes,
            "coded_nodes": self.folder.coded_nodes,
            "plugin": None if plugin is None else str(plugin),
            "embed_kernels": self.work.embed,
            "decode_profile": self.limits.decode,
            "profiles": [profile.to_json() for profile in self.work.profiles],
            "notes": list(self.notes),
        }


def plan_engine(
    onnx_folder: Path, request: EngineRequest, *, elsewhere: bool = False
) -> EnginePlan:
    """Check everything that can be checked without TensorRT, and decide the profiles.

    Args:
        onnx_folder: what is to be built.
        request: what the user asks for.
        elsewhere: it is for another machine, so that packages and memory of this one are not
            looked at; a plugin library is taken only if the user named one.

    Raises:
        InputError: the folder or plugin is refused.
        MissingPackageError: the TensorRT flavour is not installed.
        ResourceError: memory and swap cannot hold the weights and the plan.
        UsageError: a limit below 1 or of another kind of model, a target that needs no engine, or
            `plugin` and `embed`.
    """
    request.check()
    target = request.target
    folder = read_onnx_folder(onnx_folder)
    folder.require_float16()
    folder.require_cache_in_place()
    if not elsewhere:
        target.require_package()
    limits, notes = adapter_of(folder.record.task, "engine")(
        request.max_batch,
        request.max_prefill,
        folder.record.max_length,
        request.decode,
        "shared" if target.flavour == "rtx" or target.shares_memory else "separate",
    )
    workspace_bytes, workspace_notes = choose_workspace(
        request.workspace_bytes, target.shares_memory and not elsewhere
    )
    plugin, plugin_notes = (request.plugin, ()) if elsewhere else _choose_kernels(request, folder)
    work = _work(request, folder, limits, plugin, workspace_bytes)
    memory_notes = [] if elsewhere else check_memory(target, folder, limits)
    said = (*memory_notes, *notes, *workspace_notes, *plugin_notes)
    return EnginePlan(target, folder, limits, work, request.timeout_s, said)


def _work(
    request: EngineRequest,
    folder: OnnxFolder,
    limits: Limits,
    plugin: Path | None,
    workspace_bytes: int | None,
) -> WorkerRequest:
    """What the worker is told: what was asked for, what was chosen, and what the graph holds."""
    target = request.target
    assert target.compute_capability is not None, "`check` lets no cpu target through"
    onnx_profile, inputs = form_of_cache(folder, plugin)
    return WorkerRequest(
        flavour=target.flavour,
        compute_capability=target.compute_capability,
        onnx_path=folder.onnx_path,
        profiles=tuple(limits.profiles_of(inputs)),
        shared_weights=limits.decode == "shared",
        workspace_bytes=workspace_bytes,
        plugin=plugin,
        block_skip_nodes=folder.block_skip_nodes,
        onnx_profile=onnx_profile,
        embed=request.embed,
        dequantized=folder.dequantized,
        quantized_nodes=folder.quantized_nodes,
        latent_nodes=folder.latent_nodes,
        cache_nodes=folder.cache_nodes,
        coded_nodes=folder.coded_nodes,
        coded_matrices=folder.coded_matrices,
        int8_convs=folder.int8_convs,
        float_convs=folder.float_convs,
    )


def form_of_cache(folder: OnnxFolder, plugin: Path | None) -> tuple[str, Shapes]:
    """The profile whose form the graph for TensorRT has, and the shapes of its inputs.

    Args:
        folder: an export; of `compat-static` the cache grows where there is no plugin.
        plugin: the library to build with; None for none.
    """
    if plugin is None and folder.record.traits.plugin_writes:
        return COMPAT, growing_inputs(folder.inputs)
    return folder.record.profile, folder.inputs


def _choose_kernels(
    request: EngineRequest, folder: OnnxFolder
) -> tuple[Path | None, tuple[str, ...]]:
    """The plugin library to build with, and what to say of the block-skip kernels.

    Raises:
        InputError: the plugin that was named does not exist.
    """
    if request.embed:
        return None, ("block-skip kernels: compiled into the engine",)
    nodes = folder.plugin_nodes
    wanted = request.plugin is not None or nodes
    if request.target.flavour == "rtx" or not wanted:
        return None, ()
    library, note = _choose_plugin(request.plugin)
    return library, (note,)


def check_memory(
    target: Target, folder: OnnxFolder, limits: Limits, free: tuple[int, int] | None = None
) -> list[str]:
    """What building is expected to take, and the swap that helps where that is more than is free.

    It was measured with TensorRT for RTX; standard TensorRT times kernels besides.

    Args:
        target: what it is built for.
        folder: what it is built from.
        limits: what it must be able to run.
        free: memory and swap, in bytes; None looks at this machine.

    Raises:
        ResourceError: there is less than the weights and the plan take, which is sure.
    """
    available, swap = free or free_memory()
    peak = EnginePlan.peak_bytes(folder.weight_bytes, limits.decode)
    where = "" if target.flavour == "rtx" else " (as measured with TensorRT for RTX)"
    said = f"building takes about {peak / 1e9:.1f} GB of memory{where}, {available / 1e9:.1f} free"
    lacking = peak - available - swap
    least = _PEAK_BASE_BYTES + _LEAST_PER_WEIGHT * folder.weight_bytes
    if least > available + swap:
        raise ResourceError(
            "There is too little memory to build this engine.",
            where=folder.path,
            observed=f"{available / 1e9:.1f} GB free, {swap / 1e9:.1f} GB of swap",
            expected=f"at least {least / 1e9:.1f} GB, for the weights and the plan; "
            f"about {peak / 1e9:.1f} GB at the peak",
            change=swap_advice(lacking, 0),
        )
    return [said] if lacking <= 0 else [f"{said}: {swap_advice(lacking, 0)}"]


def choose_workspace(given: int | None, shares_memory: bool) -> tuple[int | None, list[str]]:
    """Most scratch memory of a kernel, and what to say of it.

    Where the CPU is in the same memory, TensorRT's default, all of the GPU's, is all there is.

    Args:
        given: bytes that the user chose; None for none.
        shares_memory: whether this machine's CPU is in the GPU's memory.
    """
    if given is not None or not shares_memory:
        return given, []
    free, _ = free_memory()
    limit = max(free // _WORKSPACE_OF_SHARED, _LEAST_WORKSPACE_BYTES) // _MEBIBYTE * _MEBIBYTE
    return limit, [
        f"scratch memory of a kernel: at most {limit // _MEBIBYTE} MiB, since the GPU shares the "
        "CPU's memory (--workspace)"
    ]


def _choose_plugin(given: Path | None) -> tuple[Path | None, str]:
    """The plugin library to build with, and what to say of it.

    Args:
        given: what the user named; None takes what `make plugin` built, if it did.

    Raises:
        InputError: the file that was named does not exist.
    """
    if given is not None:
        return _require_plugin_file(given), f"block-skip plugin: {given}"
    if BUILT_PLUGIN.is_file():
        return BUILT_PLUGIN, f"block-skip plugin: {BUILT_PLUGIN}, built by make plugin"
    return None, "no block-skip plugin: none is built (make plugin), so its function body is used"


def _require_plugin_file(path: Path) -> Path:
    """The absolute path of a plugin library; raise InputError when there is no such file."""
    if not path.is_file():
        raise InputError(
            "The plugin library is missing.",
            where=path,
            change="build it first (make plugin), or leave --plugin out",
        )
    return path.resolve()
