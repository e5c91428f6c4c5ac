"""What the build asks of its worker process, and what the worker answers: plain JSON both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.engine.profiles import ShapeProfile
from pipeline.engine.target import Flavour
from pipeline.gpu import Capability

REQUEST_FILE = "request.json"
RESULT_FILE = "result.json"
PLAN_FILE = "engine.plan"
LAYERS_FILE = "layers.json"
TIMING_CACHE_FILE = "timing.cache"
INSPECT = "inspect"
_PATHS = ("onnx_path", "plugin", "timing_cache")


@dataclass(frozen=True)
class WorkerRequest:
    """One engine to build, beside the file that asks for it.

    Attributes:
        flavour: `rtx` or `tensorrt`.
        compute_capability: of the GPU to build for; standard TensorRT takes the one it runs on.
        onnx_path: `model.onnx`, weights beside it.
        profiles: optimisation profiles, in order.
        shared_weights: ask that profiles after the first store no weights of their own.
        workspace_bytes: most scratch memory a kernel may use; None leaves TensorRT's default.
        plugin: library to load before parsing; None for none.
        block_skip_nodes: how many block-skip nodes the graph holds.
        onnx_profile: whose operators decide the oldest TensorRT that will do; `compat` of a graph
            of `compat-static` that no plugin writes the cache of.
        embed: put the block-skip kernels into the engine, in place of a plugin library.
        dequantized: matrices that the graph reads from low-bit codes by DequantizeLinear.
        quantized_nodes: block-skip nodes with such a factor, which no plugin takes.
        latent_nodes: attention to latents that a plugin may take.
        cache_nodes: nodes that write a cache of fixed length, which the plugin takes.
        coded_nodes: nodes of codes, which the plugin takes or DequantizeLinear stands in for.
        coded_matrices: matrices that these hold.
        int8_convs: names of convolutions that multiply codes with codes.
        float_convs: of all others.
        timing_cache: file of how long kernels took in an earlier build; None for none.
        adopted: the plan is there already, beside the file that asks: made by another program.
        prepared: the graph is as TensorRT must be given it, made so by `graph_to_parse` elsewhere:
            this machine has no package onnx.
    """

    flavour: Flavour
    compute_capability: Capability
    onnx_path: Path
    profiles: tuple[ShapeProfile, ...]
    shared_weights: bool
    workspace_bytes: int | None
    plugin: Path | None
    block_skip_nodes: int
    onnx_profile: str
    embed: bool = False
    dequantized: int = 0
    quantized_nodes: int = 0
    latent_nodes: int = 0
    cache_nodes: int = 0
    coded_nodes: int = 0
    coded_matrices: int = 0
    int8_convs: tuple[str, ...] = ()
    float_convs: tuple[str, ...] = ()
    timing_cache: Path | None = None
    adopted: bool = False
    prepared: bool = False

    @property
    def writes_in_place(self) -> bool:
        """Whether a plugin is to write its input."""
        return self.plugin is not None and self.cache_nodes > 0

    def to_json(self) -> dict[str, Any]:
        """Plain values for `request.json`."""
        fields = asdict(self)
        fields["profiles"] = [profile.to_json() for profile in self.profiles]
        for name in _PATHS:
            fields[name] = None if fields[name] is None else str(fields[name])
        return fields

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> WorkerRequest:
        """The inverse of `to_json`."""
        values = dict(fields)
        values["profiles"] = tuple(ShapeProfile.from_json(entry) for entry in values["profiles"])
        for name in {"compute_capability", "int8_convs", "float_convs"} & values.keys():
            values[name] = tuple(values[name])
        for name in _PATHS:
            values[name] = None if values.get(name) is None else Path(values[name])
        return WorkerRequest(**values)


@dataclass(frozen=True)
class WorkerResult:
    """What a worker read back from a build that succeeded.

    Attributes:
        library_version: of the TensorRT that built it.
        block_skip: how the block-skip nodes were taken, see `network`.
        layer_types: network layers after parsing, counted by type.
        engine_layers: why layers of the built engine cannot be read; empty where they may be,
            which another process finds out.
        parse_seconds: time to parse the ONNX file.
        build_seconds: time to build and write the plan.
        peak_memory_bytes: largest resident size of the worker.
        notes: every choice that differs from the straight path.
        few_bits: how the quantised matrices were taken, see `network`.
        latent_attention: likewise, of attention to latents that a plugin may take.
        cache_write: likewise, of nodes that write the cache; empty without any.
        int8: in what convolutions of codes are computed, see `int8_layers`.
    """

    library_version: str
    block_skip: dict[str, Any]
    layer_types: dict[str, int]
    engine_layers: dict[str, Any]
    parse_seconds: float
    build_seconds: float
    peak_memory_bytes: int
    notes: tuple[str, ...]
    few_bits: dict[str, Any] = field(default_factory=dict)
    latent_attention: dict[str, Any] = field(default_factory=dict)
    cache_write: dict[str, Any] = field(default_factory=dict)
    int8: dict[str, Any] = field(default_factory=dict)
