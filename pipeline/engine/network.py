"""A build in either flavour: parse, look at what became of the nodes, add profiles, write the plan.

`library` is the imported module, `tensorrt` or `tensorrt_rtx`; their Python interfaces agree in
everything used here, so one text serves both and is type-checked against `tensorrt`. No flag is
trusted: the layers are counted.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.engine.int8_layers import int8_layers
from pipeline.engine.log import make_logger
from pipeline.engine.paths import paths_taken
from pipeline.engine.profiles import ShapeProfile
from pipeline.engine.worker_protocol import PLAN_FILE, WorkerRequest, WorkerResult
from pipeline.errors import InputError, ResourceError

if TYPE_CHECKING:
    import tensorrt as trt

OUT_OF_MEMORY_WORDS = ("out of memory", "outofmemory", "bad_alloc", "cannot allocate memory")
_SHOWN_ERRORS = 5
_ADOPTED = (
    "the plan was adopted: its shapes and inputs are those of this graph, its weights were not "
    "compared"
)
_NO_DRIVER = "cudaError 35"


@dataclass
class _ParsedNetwork:
    """A network and everything that must outlive it; what is logged of errors and of layers."""

    builder: trt.Builder
    network: trt.INetworkDefinition
    parser: trt.OnnxParser
    errors: list[str]
    layers: list[str]


def build_network(
    library: Any,
    request: WorkerRequest,
    staging: Path,
    onnx_path: Path,
    *,
    configure: Callable[[trt.IBuilderConfig], None] = lambda config: None,
    finish: Callable[[trt.IBuilderConfig], None] = lambda config: None,
    unreadable: str = "",
) -> WorkerResult:
    """Build the engine of `request` and write its plan, or only parse for one that is adopted.

    Args:
        library: the imported module.
        request: what to build.
        staging: folder that the plan is written into.
        onnx_path: the graph to parse, which may be a variant of the request's.
        configure: sets what only one flavour has.
        finish: takes from the configuration what the build left there.
        unreadable: why the built engine cannot be read back here; empty where it can.

    Raises:
        InputError: the graph is refused, or not taken as it was meant.
        ResourceError: memory ran out.
    """
    started = time.monotonic()
    parsed = _parse_network(library, onnx_path)
    parse_seconds = time.monotonic() - started
    layer_types = _count_layer_types(parsed.network)
    taken = paths_taken(request, layer_types)
    started = time.monotonic()
    if not request.adopted:
        config = _make_config(library, parsed, request)
        configure(config)
        _write_plan(parsed, config, staging / PLAN_FILE)
        finish(config)
    build_seconds = time.monotonic() - started
    int8 = int8_layers(parsed.layers, request.int8_convs, request.float_convs)
    return WorkerResult(
        library_version=library.__version__,
        layer_types=layer_types,
        engine_layers={"readable": False, "why": unreadable} if unreadable else {},
        parse_seconds=parse_seconds,
        build_seconds=build_seconds,
        peak_memory_bytes=0,
        notes=(_ADOPTED,) if request.adopted else (),
        int8=int8,
        **taken,
    )


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
    layers: list[str] = []
    builder = library.Builder(make_logger(library, errors, layers))
    network = builder.create_network(_strongly_typed_flags(library))
    parser = library.OnnxParser(network, builder.logger)
    if not parser.parse_from_file(str(onnx_path)):
        raise _parse_failure(parser, onnx_path, errors)
    errors.clear()
    return _ParsedNetwork(builder, network, parser, errors, layers)


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
    if request.writes_in_place:
        # Without it TensorRT gives the plugin's output a memory of its own.
        config.set_preview_feature(library.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
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
