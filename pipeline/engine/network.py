"""A build in either flavour: parse, add profiles, write the plan, read back what became of it.

`library` is the imported module, `tensorrt` or `tensorrt_rtx`; their Python interfaces agree in
everything used here, so one text serves both and is type-checked against `tensorrt`. No flag is
trusted: the layers are counted.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.engine.profiles import ShapeProfile
from pipeline.engine.target import LIBRARIES, Flavour
from pipeline.engine.worker_protocol import PLAN_FILE, WorkerRequest, WorkerResult
from pipeline.errors import InputError, MissingPackageError, ResourceError
from pipeline.export.contract import BLOCK_SKIP, DOMAIN, OP_VERSION

if TYPE_CHECKING:
    import tensorrt as trt

OUT_OF_MEMORY_WORDS = ("out of memory", "outofmemory", "bad_alloc", "cannot allocate memory")
_SHOWN_ERRORS = 5
_NO_DRIVER = "cudaError 35"
_PLUGIN_LAYER = "PLUGIN_V3"
_DEQUANTIZE_LAYER = "DEQUANTIZE"
_EMBEDDED_LAYERS_OF_A_NODE = 2


@dataclass
class _ParsedNetwork:
    """A network and everything that must outlive it."""

    builder: trt.Builder
    network: trt.INetworkDefinition
    parser: trt.OnnxParser
    errors: list[str]


@dataclass(frozen=True)
class _BlockSkipPath:
    """How the block-skip nodes of a graph were taken.

    Attributes:
        path: `plugin`, `embedded kernels` (see `standard`), `function body` (inlined into
            native layers), or `none` without such nodes.
        nodes: how many there are.
    """

    path: Literal["plugin", "embedded kernels", "function body", "none"]
    nodes: int


def load_library(flavour: Flavour, purpose: str) -> Any:
    """The TensorRT of a flavour; raise MissingPackageError when it cannot be imported."""
    module, package, extra = LIBRARIES[flavour]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(package, extra, purpose) from error


def build_network(
    library: Any,
    request: WorkerRequest,
    staging: Path,
    onnx_path: Path,
    *,
    configure: Callable[[trt.IBuilderConfig], None] = lambda config: None,
    unreadable: str = "",
) -> WorkerResult:
    """Build the engine of `request` and write its plan.

    Args:
        library: the imported module.
        request: what to build.
        staging: folder that the plan is written into.
        onnx_path: the graph to parse, which may be a variant of the request's.
        configure: sets what only one flavour has.
        unreadable: why the built engine cannot be read back here; empty where it can.

    Raises:
        InputError: the graph is refused, or not taken as it was meant.
        ResourceError: memory ran out.
    """
    started = time.monotonic()
    parsed = _parse_network(library, onnx_path)
    parse_seconds = time.monotonic() - started
    layer_types = _count_layer_types(parsed.network)
    block_skip = asdict(_block_skip_path_of(request, layer_types))
    others = request.block_skip_nodes * (_EMBEDDED_LAYERS_OF_A_NODE if request.embed else 1)
    latents = _latent_path(layer_types, request.latent_nodes, others)
    quantized = _quantized_path(layer_types, request.dequantized, request.quantized_nodes)
    config = _make_config(library, parsed, request)
    configure(config)
    started = time.monotonic()
    plan_path = staging / PLAN_FILE
    _write_plan(parsed, config, plan_path)
    build_seconds = time.monotonic() - started
    why = {"readable": False, "why": unreadable}
    return WorkerResult(
        library_version=library.__version__,
        block_skip=block_skip,
        layer_types=layer_types,
        engine_layers=why if unreadable else _read_engine_layers(library, plan_path),
        parse_seconds=parse_seconds,
        build_seconds=build_seconds,
        peak_memory_bytes=0,
        notes=(),
        few_bits=quantized,
        latent_attention=latents,
    )


def _make_logger(library: Any, errors: list[str]) -> trt.ILogger:
    """A logger that prints INFO and above on stderr, and appends errors to `errors`."""

    class Log(library.ILogger):
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            if severity > library.ILogger.INFO:
                return
            print(f"[{severity.name}] {message}", file=sys.stderr, flush=True)
            if severity <= library.ILogger.ERROR:
                errors.append(message)

    return Log()


def _strongly_typed_flags(library: Any) -> int:
    """Flags that make the network keep the graph's types; from 11 on there is no other kind."""
    flag = getattr(library.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _parse_network(library: Any, onnx_path: Path) -> _ParsedNetwork:
    """Parse an ONNX file from its path, so that weights above 2 GB load from beside it.

    Raises:
        InputError: the parser refuses the graph.
    """
    errors: list[str] = []
    builder = library.Builder(_make_logger(library, errors))
    network = builder.create_network(_strongly_typed_flags(library))
    parser = library.OnnxParser(network, builder.logger)
    if not parser.parse_from_file(str(onnx_path)):
        raise _parse_failure(parser, onnx_path, errors)
    errors.clear()
    return _ParsedNetwork(builder, network, parser, errors)


def _parse_failure(parser: trt.OnnxParser, onnx_path: Path, errors: list[str]) -> InputError:
    """The error for a graph that the parser refuses, with the nodes it names."""
    found = []
    for index in range(min(parser.num_errors, _SHOWN_ERRORS)):
        error = parser.get_error(index)
        found.append(f"{error.node_operator()} '{error.node_name()}': {_readable(error.desc())}")
    return InputError(
        "TensorRT cannot parse this graph.",
        where=onnx_path,
        observed="; ".join(found) or _said(errors),
        change="export the checkpoint again; --profile compat uses only operators that every "
        "TensorRT 10 knows",
    )


def _said(errors: Sequence[str]) -> str:
    """The last errors TensorRT logged, for a message."""
    texts = [text for text in map(_readable, errors) if text]
    return "; ".join(texts[-_SHOWN_ERRORS:]) or "no reason given"


def _readable(text: str) -> str:
    """`text` without the lines on the missing driver that every failure without a GPU carries."""
    return "\n".join(line for line in text.splitlines() if _NO_DRIVER not in line)


def _make_config(
    library: Any, parsed: _ParsedNetwork, request: WorkerRequest
) -> trt.IBuilderConfig:
    """A builder configuration with the profiles and limits of a request.

    Raises:
        InputError: TensorRT finds the shapes of a profile impossible.
    """
    config = parsed.builder.create_builder_config()
    # Detailed names cost about 3 kB of plan, and let the inspector say what each layer became.
    config.profiling_verbosity = library.ProfilingVerbosity.DETAILED
    if request.workspace_bytes is not None:
        config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, request.workspace_bytes)
    for index, profile in enumerate(request.profiles):
        _add_profile(parsed, config, profile, share=request.shared_weights and index > 0)
    return config


def _add_profile(
    parsed: _ParsedNetwork, config: trt.IBuilderConfig, profile: ShapeProfile, *, share: bool
) -> None:
    """Give the configuration one optimisation profile; with `share` it adds no weights.

    Raises:
        InputError: TensorRT finds the shapes impossible.
    """
    native = parsed.builder.create_optimization_profile()
    if share:
        # Documented for standard TensorRT; without effect on TensorRT for RTX 1.7 (measured).
        native.extra_memory_target = 0.0
    for name, ends in profile.shapes.items():
        native.set_shape(name, ends.min, ends.opt, ends.max)
    if config.add_optimization_profile(native) < 0:
        raise InputError(
            f"TensorRT refuses the shapes of the {profile.name} profile.",
            observed=_said(parsed.errors),
            change="lower --max-prefill or --max-batch",
        )


def _write_plan(parsed: _ParsedNetwork, config: trt.IBuilderConfig, path: Path) -> None:
    """Build the engine and write its plan.

    Raises:
        InputError: TensorRT has no implementation for the network.
        ResourceError: memory ran out.
    """
    plan = parsed.builder.build_serialized_network(parsed.network, config)
    if plan is None:
        raise _build_failure(parsed.errors)
    path.write_bytes(memoryview(plan))


def _build_failure(errors: Sequence[str]) -> InputError | ResourceError:
    """The error for a build that returned nothing, by what TensorRT logged."""
    observed = _said(errors)
    if any(word in observed.lower() for word in OUT_OF_MEMORY_WORDS):
        return ResourceError(
            "Memory ran out while TensorRT built the engine.",
            observed=observed,
            change="lower --max-batch or --max-prefill, close other programs, or add swap",
        )
    return InputError(
        "TensorRT cannot build this graph.",
        observed=observed,
        change="export again with --profile compat, which uses no operator that needs a kernel of "
        "its own",
    )


def _count_layer_types(network: trt.INetworkDefinition) -> dict[str, int]:
    """Layers of a parsed network by type, the most frequent first."""
    types = (network.get_layer(index).type.name for index in range(network.num_layers))
    return dict(Counter(types).most_common())


def _block_skip_path_of(request: WorkerRequest, layer_types: Mapping[str, int]) -> _BlockSkipPath:
    """Which path the block-skip nodes took; raise InputError if it is not the one asked for."""
    if request.embed:
        return _embedded_path(layer_types, request.block_skip_nodes)
    return _block_skip_path(
        layer_types, request.block_skip_nodes, request.plugin is not None, request.latent_nodes
    )


def _latent_path(layer_types: Mapping[str, int], nodes: int, others: int) -> dict[str, Any]:
    """How attention to latents was taken, for the manifest.

    Args:
        layer_types: layers of the parsed network by type, which `_block_skip_path` looked at.
        nodes: attention to latents that a plugin may take.
        others: plugin layers that block skip may have.
    """
    taken = nodes > 0 and layer_types.get(_PLUGIN_LAYER, 0) == others + nodes
    body = "function body" if nodes else "none"
    return {"nodes": nodes, "path": "plugin" if taken else body}


def _block_skip_path(
    layer_types: Mapping[str, int], nodes: int, plugin_wanted: bool, latent_nodes: int = 0
) -> _BlockSkipPath:
    """Which path the block-skip nodes took.

    A plugin whose namespace or version does not match is passed over without a word, so the
    number of plugin layers has to be the number of nodes, or zero; with those of attention to
    latents, where the library has a plugin for them.

    Args:
        layer_types: layers of the parsed network by type.
        nodes: block-skip nodes in the ONNX graph.
        plugin_wanted: whether the user gave a plugin library.
        latent_nodes: attention to latents that a plugin may take.

    Raises:
        InputError: some nodes took the plugin and some not, or none took the plugin that was given.
    """
    plugin_layers = layer_types.get(_PLUGIN_LAYER, 0)
    if plugin_layers not in (0, nodes, nodes + latent_nodes):
        raise InputError(
            "Only part of the block-skip nodes took the plugin.",
            observed=f"{plugin_layers} plugin layers",
            expected=f"0 or {nodes}" + (f", or {nodes + latent_nodes}" if latent_nodes else ""),
            change="export again, so that all nodes name the same plugin version and namespace",
        )
    if plugin_wanted and plugin_layers == 0:
        raise InputError(
            "The plugin was loaded, and no node of the graph took it.",
            observed=f"0 plugin layers for {nodes} block-skip nodes",
            expected="as many plugin layers as nodes, and at least one",
            change="check the plugin's name, version and namespace "
            f"({BLOCK_SKIP}, {OP_VERSION}, {DOMAIN}), or build without --plugin",
        )
    if nodes == 0:
        return _BlockSkipPath("none", 0)
    return _BlockSkipPath("plugin" if plugin_layers else "function body", nodes)


def _embedded_path(layer_types: Mapping[str, int], nodes: int) -> _BlockSkipPath:
    """The path of nodes that were split for embedded kernels: every product a plugin layer.

    Args:
        layer_types: layers of the parsed network by type.
        nodes: block-skip nodes in the ONNX graph.

    Raises:
        InputError: some products are not.
    """
    found, expected = layer_types.get(_PLUGIN_LAYER, 0), _EMBEDDED_LAYERS_OF_A_NODE * nodes
    if found != expected:
        raise InputError(
            "Not every block-skip node became embedded kernels.",
            observed=f"{found} plugin layers",
            expected=f"{expected}, two for each of {nodes} nodes",
            change="build with the plugin library instead: make plugin",
        )
    return _BlockSkipPath("embedded kernels" if nodes else "none", nodes)


def _quantized_path(layer_types: Mapping[str, int], matrices: int, nodes: int) -> dict[str, Any]:
    """How the quantised matrices were taken, for the manifest.

    Args:
        layer_types: layers of the parsed network by type.
        matrices: DequantizeLinear nodes in the ONNX graph.
        nodes: block-skip nodes with a quantised factor.

    Raises:
        InputError: some matrices are codes no longer after parsing: the plan would hold numbers.
    """
    layers = layer_types.get(_DEQUANTIZE_LAYER, 0)
    if layers < matrices:
        raise InputError(
            "TensorRT wrote low-bit codes out as numbers while parsing.",
            observed=f"{layers} layers of the kind {_DEQUANTIZE_LAYER}",
            expected=f"{matrices}, one for each quantised matrix",
            change="export with --weights float, or use the TensorRT that this was tested with",
        )
    path = "function body" if nodes else "none"
    return {"matrices": matrices, "block_skip_nodes": nodes, "path": path}


def _read_engine_layers(library: Any, plan_path: Path) -> dict[str, Any]:
    """Layers of a built engine, through the engine inspector.

    Deserialising needs a CUDA driver and the GPU the plan is for, so this works where the engine
    can run: TensorRT for RTX 1.7 without a driver stops at cudaError 35, for the engine and for
    `get_engine_validity` alike.

    Returns:
        `{"readable": True, "types": {...}, "device_memory_bytes": n}`, or
        `{"readable": False, "why": ...}`.
    """
    errors: list[str] = []
    runtime = library.Runtime(_make_logger(library, errors))
    if hasattr(runtime, "engine_host_code_allowed"):
        runtime.engine_host_code_allowed = False
    engine = runtime.deserialize_cuda_engine(plan_path.read_bytes())
    if engine is None:
        return {"readable": False, "why": errors[0] if errors else "no reason given"}
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(library.LayerInformationFormat.JSON)
    return {
        "readable": True,
        "types": _inspected_types(text),
        "device_memory_bytes": int(engine.device_memory_size_v2),
    }


def _inspected_types(text: str) -> dict[str, int]:
    """Layers by type out of the inspector's JSON; 'unnamed' for those it gives only as a name."""
    layers = json.loads(text).get("Layers", [])
    types = (
        str(layer.get("LayerType", "unnamed")) if isinstance(layer, dict) else "unnamed"
        for layer in layers
    )
    return dict(Counter(types).most_common())
