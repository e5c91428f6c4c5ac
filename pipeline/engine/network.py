"""The steps of a build that both TensorRT flavours share: parse, add profiles, serialise.

`library` is the imported module, `tensorrt` or `tensorrt_rtx`; their Python interfaces agree in
everything used here, so one text serves both and is type-checked against `tensorrt`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.engine.profiles import Profile
from pipeline.engine.worker_protocol import BuildRequest
from pipeline.errors import InputError, ResourceError

if TYPE_CHECKING:
    import tensorrt as trt

OUT_OF_MEMORY_WORDS = ("out of memory", "outofmemory", "bad_alloc", "cannot allocate memory")
SHOWN_ERRORS = 5
NO_DRIVER = "cudaError 35"


@dataclass
class ParsedNetwork:
    """A network and everything that must outlive it."""

    builder: trt.Builder
    network: trt.INetworkDefinition
    parser: trt.OnnxParser
    errors: list[str]


def make_logger(library: Any, errors: list[str]) -> trt.ILogger:
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


def strongly_typed_flags(library: Any) -> int:
    """Flags that make the network keep the graph's types; from 11 on there is no other kind."""
    flag = getattr(library.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def parse_network(library: Any, onnx_path: Path) -> ParsedNetwork:
    """Parse an ONNX file from its path, so that weights above 2 GB load from beside it.

    Raises:
        InputError: the parser refuses the graph.
    """
    errors: list[str] = []
    builder = library.Builder(make_logger(library, errors))
    network = builder.create_network(strongly_typed_flags(library))
    parser = library.OnnxParser(network, builder.logger)
    if not parser.parse_from_file(str(onnx_path)):
        raise parse_failure(parser, onnx_path, errors)
    errors.clear()
    return ParsedNetwork(builder, network, parser, errors)


def parse_failure(parser: trt.OnnxParser, onnx_path: Path, errors: list[str]) -> InputError:
    """The error for a graph that the parser refuses, with the nodes it names."""
    found = []
    for index in range(min(parser.num_errors, SHOWN_ERRORS)):
        error = parser.get_error(index)
        found.append(f"{error.node_operator()} '{error.node_name()}': {readable(error.desc())}")
    return InputError(
        "TensorRT cannot parse this graph.",
        where=onnx_path,
        observed="; ".join(found) or said(errors),
        change="export the checkpoint again; --profile compat uses only operators that every "
        "TensorRT 10 knows",
    )


def said(errors: Sequence[str]) -> str:
    """The last errors TensorRT logged, for a message."""
    texts = [text for text in map(readable, errors) if text]
    return "; ".join(texts[-SHOWN_ERRORS:]) or "no reason given"


def readable(text: str) -> str:
    """`text` without the lines on the missing driver that every failure without a GPU carries."""
    return "\n".join(line for line in text.splitlines() if NO_DRIVER not in line)


def make_config(library: Any, parsed: ParsedNetwork, request: BuildRequest) -> trt.IBuilderConfig:
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
        add_profile(parsed, config, profile, share=request.shared_weights and index > 0)
    return config


def add_profile(
    parsed: ParsedNetwork, config: trt.IBuilderConfig, profile: Profile, *, share: bool
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
            observed=said(parsed.errors),
            change="lower --max-prefill or --max-batch",
        )


def write_plan(parsed: ParsedNetwork, config: trt.IBuilderConfig, path: Path) -> None:
    """Build the engine and write its plan.

    Raises:
        InputError: TensorRT has no implementation for the network.
        ResourceError: memory ran out.
    """
    plan = parsed.builder.build_serialized_network(parsed.network, config)
    if plan is None:
        raise build_failure(parsed.errors)
    path.write_bytes(memoryview(plan))


def build_failure(errors: Sequence[str]) -> InputError | ResourceError:
    """The error for a build that returned nothing, by what TensorRT logged."""
    observed = said(errors)
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
