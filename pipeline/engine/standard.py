"""Standard TensorRT, 10.3 to 11.x: builds on the GPU that will run the engine.

It may take block-skip nodes, and those of codes, as kernels of ours. From a plugin library: up to
TensorRT 10.6 a local function always wins over a plugin of the same name, so there the plugin is
only taken from a file that has no such function. Or embedded in the engine, without codes: then
each node is split into the two that `trt_plugins.block_skip.aot` offers to it:

    BlockSkipLinear(x, a, b)               ->  BlockSkipProduct(BlockSkipMix(x, a), b)
    BlockSkipLinearIndexed(x, a, b, index) ->  BlockSkipProduct(BlockSkipMixIndexed(x, a, index), b)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.engine.graph_variant import remove_variant, without_plugin, write_variant
from pipeline.engine.network import build_network
from pipeline.engine.target import load_library
from pipeline.engine.worker_protocol import (
    TIMING_CACHE_FILE,
    WorkerRequest,
    WorkerResult,
)
from pipeline.errors import InputError
from pipeline.export.contract import (
    BLOCK_SKIP,
    BLOCK_SKIP_OPS,
    CACHE_WRITE,
    COMPAT,
    COMPAT_STATIC,
    DEFAULT_PROFILE,
    DOMAIN,
    OP_VERSION,
    PLUGIN_OPS,
    PROFILES,
    QUANTIZED_OPS,
    dotted,
)
from pipeline.export.onnx_folder import load_graph, takes_plugin

if TYPE_CHECKING:
    import onnx
    import tensorrt as trt

_FIRST_PLUGIN_OVER_FUNCTION = (10, 7)


def build(request: WorkerRequest, staging: Path) -> WorkerResult:
    """Build the engine of `request` on this machine's GPU and write its plan into `staging`.

    Raises:
        InputError: TensorRT is too old for the export, or the plugin or graph is refused.
        MissingPackageError: tensorrt is not installed.
        ResourceError: memory ran out.
    """
    library = load_library("tensorrt", "build an engine with standard TensorRT")
    _require_version(_parse_version(library.__version__), request.onnx_profile)
    offered = [] if request.plugin is None else load_plugin(library, request.plugin)
    if request.embed:
        _register_kernels(request)
    request, onnx_path, notes = graph_to_parse(
        request, staging, library.__version__, {creator.name for creator in offered}
    )
    said = list(notes)
    result = build_network(
        library,
        request,
        staging,
        onnx_path,
        configure=lambda config: said.extend(_use_timings(config, request.timing_cache)),
        finish=lambda config: _keep_timings(config, staging / TIMING_CACHE_FILE),
    )
    remove_variant(request, onnx_path)
    return replace(result, notes=(*result.notes, *said))


def _use_timings(config: trt.IBuilderConfig, path: Path | None) -> tuple[str, ...]:
    """Start from the timings of an earlier build, where they are of this TensorRT and this GPU.

    Returns:
        What to note.
    """
    known = b"" if path is None else path.read_bytes()
    if config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False):
        return ("timings of kernels are those of the build before, where it had them",) * bool(
            known
        )
    config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    return ("timings of the build before are of another TensorRT or GPU: all are taken again",)


def _keep_timings(config: trt.IBuilderConfig, path: Path) -> None:
    """Write down how long kernels took, for the next build."""
    cache = config.get_timing_cache()
    if cache is not None:
        path.write_bytes(memoryview(cache.serialize()))


def _register_kernels(request: WorkerRequest) -> None:
    """Offer the block-skip kernels to this TensorRT; raise InputError when it cannot embed them."""
    from trt_plugins.block_skip.aot import register

    major, minor = request.compute_capability
    register(10 * major + minor)


def _parse_version(text: str) -> tuple[int, ...]:
    """'10.3.0' or '11.4.0.106' -> (10, 3, 0) or (11, 4, 0, 106); a suffix ends it."""
    parts: list[int] = []
    for part in text.split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)


def _require_version(version: tuple[int, ...], onnx_profile: str) -> None:
    """Raise InputError when this TensorRT lacks the operators of the export's profile."""
    oldest = PROFILES[onnx_profile].oldest_tensorrt
    assert oldest is not None, "an export that TensorRT does not know is refused before"
    if version[:2] < oldest:
        raise InputError(
            f"This TensorRT is too old for the export profile '{onnx_profile}'.",
            observed=f"TensorRT {dotted(version)}",
            expected=f"TensorRT {dotted(oldest)} or newer",
            change=f"export the checkpoint again with --profile {COMPAT}"
            if oldest != PROFILES[COMPAT].oldest_tensorrt
            else f"update TensorRT (JetPack 6.1 or newer brings {dotted(oldest)})",
        )


def newest_profile() -> str:
    """The newest export profile that the TensorRT of this machine knows.

    Raises:
        InputError: it knows none.
        MissingPackageError: tensorrt is not installed.
    """
    library = load_library("tensorrt", "build an engine with standard TensorRT")
    return profile_for(library.__version__)


def profile_for(version_text: str) -> str:
    """The newest export profile that a TensorRT knows, by its version.

    Raises:
        InputError: it knows none.
    """
    version = _parse_version(version_text)
    oldest = PROFILES[DEFAULT_PROFILE].oldest_tensorrt
    if oldest is not None and version[:2] >= oldest:
        return DEFAULT_PROFILE
    _require_version(version, COMPAT_STATIC)
    return COMPAT_STATIC


def graph_to_parse(
    request: WorkerRequest, staging: Path, version: str, offered: set[str]
) -> tuple[WorkerRequest, Path, tuple[str, ...]]:
    """The graph this TensorRT must be given, what it holds, and what to note.

    Args:
        request: as the user asked; its graph is not changed.
        staging: where another is written.
        version: of TensorRT.
        offered: the plugin's ops.

    Raises:
        InputError: the plugin lacks an op that the graph holds codes in.
    """
    if request.prepared:
        return request, request.onnx_path, ()
    if request.plugin is not None:
        _require_ops(request, offered)
        if not prefers_functions(version):
            return request, request.onnx_path, ()
        stripped = _write_stripped_graph(request.onnx_path, staging / "stripped", offered)
        return (
            request,
            stripped,
            (
                "function bodies of the plugin's ops were removed from the graph given to "
                "TensorRT, which would have preferred them to the plugin",
            ),
        )
    request, onnx_path, notes = without_plugin(request, staging)
    if request.embed:
        split = _write_split_graph(onnx_path, staging / "split")
        remove_variant(request, onnx_path)
        said = "block-skip kernels are part of the engine: it needs no plugin library"
        return request, split, (*notes, said)
    return request, onnx_path, notes


def _require_ops(request: WorkerRequest, offered: Collection[str]) -> None:
    """Raise InputError when a plugin lacks an op whose body will not do.

    TensorRT refuses those of codes, and that of CacheWrite is a copy.
    """
    nodes = load_graph(request.onnx_path).graph.node
    used = {node.op_type for node in nodes if node.domain == DOMAIN}
    missing = sorted((used & {*QUANTIZED_OPS, CACHE_WRITE}) - {*offered})
    if missing:
        raise InputError(
            "This plugin library does not know ops that the graph needs one for.",
            where=request.plugin,
            observed=f"no {', '.join(missing)}",
            change="build it again (make plugin), or build the engine without --plugin",
        )


def prefers_functions(version: str) -> bool:
    """Whether a TensorRT takes an op's function although there is a plugin for it."""
    return _parse_version(version)[:2] < _FIRST_PLUGIN_OVER_FUNCTION


def _write_stripped_graph(
    onnx_path: Path, folder: Path, offered: Collection[str] = BLOCK_SKIP_OPS
) -> Path:
    """Write `onnx_path` without the bodies that a plugin takes the place of into a new `folder`.

    Args:
        onnx_path: as below.
        folder: as below.
        offered: ops that the plugin library has; attention to latents keeps its body where a
            node's shapes are none of the kernels'.
    """
    model = load_graph(onnx_path)
    latents = {node.op_type for node in model.graph.node if takes_plugin(node)}
    replaced = {*BLOCK_SKIP_OPS, *QUANTIZED_OPS, CACHE_WRITE, *latents} & {*offered}
    return write_variant(model, onnx_path, folder, replaced)


def _write_split_graph(onnx_path: Path, folder: Path) -> Path:
    """Write `onnx_path` with every block-skip node split into a new `folder`, with its weights.

    Args:
        onnx_path: absolute path of a graph with external weights beside it.
        folder: is made; holds the graph and symbolic links to its weights, which TensorRT
            follows (the onnx package would not, nor would it read a hard link).

    Returns:
        Path of the new graph.
    """
    model = load_graph(onnx_path)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        ours = node.domain == DOMAIN and node.op_type in BLOCK_SKIP_OPS
        nodes += _split_node(node) if ours else [node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return write_variant(model, onnx_path, folder, BLOCK_SKIP_OPS)


def _split_node(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """One block-skip node as its two products, which ask for embedded kernels."""
    from onnx import helper

    from trt_plugins.block_skip.aot import MIX, MIX_INDEXED, PRODUCT

    x, a, b, *index = node.input
    latent = f"{node.output[0]}/latent"
    # `aot`: embedded or refused, whatever the network's flags prefer.
    attributes: dict[str, Any] = {
        "plugin_namespace": DOMAIN,
        "plugin_version": str(OP_VERSION),
        "aot": 1,
    }
    name = node.name or node.output[0]
    mix = helper.make_node(
        MIX_INDEXED if index else MIX, [x, a, *index], [latent], name=f"{name}/mix",
        domain=DOMAIN, **attributes,
    )  # fmt: skip
    product = helper.make_node(
        PRODUCT, [latent, b], list(node.output), name=f"{name}/product",
        domain=DOMAIN, **attributes,
    )  # fmt: skip
    return [mix, product]


@dataclass(frozen=True)
class _PluginCreator:
    """What a registered plugin is found by."""

    name: str
    version: str
    namespace: str


def load_plugin(library: Any, path: Path) -> list[_PluginCreator]:
    """Load a plugin library into the registry and return the creators of ours it brought.

    Args:
        library: the imported TensorRT module.
        path: the `.so`.

    Raises:
        InputError: it cannot be loaded, or brings no block-skip plugin.
    """
    registry = library.get_plugin_registry()
    if registry.load_library(str(path)) is None:
        raise InputError(
            "TensorRT cannot load this plugin library.",
            where=path,
            change="build it on this machine against the installed TensorRT; build.log says more",
        )
    found = [_describe(creator) for creator in registry.all_creators]
    ours = _our_creators(found)
    if not any(creator.name in BLOCK_SKIP_OPS for creator in ours):
        raise InputError(
            "This library has no block-skip plugin.",
            where=path,
            observed=", ".join(f"{item.namespace}::{item.name} {item.version}" for item in found),
            expected=f"{DOMAIN}::{BLOCK_SKIP} {OP_VERSION!s}",
        )
    return ours


def _describe(creator: Any) -> _PluginCreator:
    """Name, version and namespace of a registered creator."""
    return _PluginCreator(creator.name, creator.plugin_version, creator.plugin_namespace)


def _our_creators(creators: list[_PluginCreator]) -> list[_PluginCreator]:
    """Those that the graph's nodes resolve to; another namespace would be passed over silently."""
    return [
        creator
        for creator in creators
        if creator.name in PLUGIN_OPS
        and creator.namespace == DOMAIN
        and creator.version == str(OP_VERSION)
    ]
