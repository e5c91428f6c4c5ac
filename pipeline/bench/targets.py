"""What is to be measured or predicted: folders and shapes, checked and counted first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.bench.traffic import CacheTensor, RebuiltKeys, StoredTensor, Traffic
from pipeline.engine.manifest import read_manifest
from pipeline.errors import InputError, UsageError
from pipeline.export.contract import (
    CACHE_PREFIX,
    COMPAT,
    CPU_KERNEL_OPS,
    DOMAIN,
    FLOAT16,
    GATHER_NBITS,
    GRAPH_FILE,
    GROUPED_ATTENTION,
    HELD_FORMS,
    LOOK_UP_BLOCKS_OPS,
    MATMUL_NBITS,
    NIBBLES,
    NUMBERS,
    PROFILES,
    RECORD_FILE,
    latent_attention_op,
    steps_name,
)
from pipeline.export.record import ExportRecord, read_export_record
from pipeline.json_file import read_json_object
from pipeline.model.task import require_decoder
from pipeline.provenance import public_name

# What PyTorch holds a checkpoint in on the CPU, and what ONNX Runtime widens float16 to.
_CPU_FLOAT_BYTES = 4
_CONCAT_PASSES = 3
_STEPS_BYTES = 4  # of codes: a step and an offset, of a token and group
# Operator -> inputs of which one row is read for a token.
_LOOKED_UP = {
    "Gather": (0,),
    GATHER_NBITS: (0, 2, 3),
    GROUPED_ATTENTION: (7, 8),
    **CPU_KERNEL_OPS,
    **dict.fromkeys(LOOK_UP_BLOCKS_OPS.values(), (1, 2, 3)),
}
# Operator -> input that is the matrix of a product. A head that is also the embedding is turned
# first, which ONNX Runtime does once, as it loads.
_PRODUCTS = {"MatMul": (0, 1), "Gemm": (1,), MATMUL_NBITS: (1,), "Transpose": (0,)}
_Use = tuple[str, str, int]  # domain, operator, number of the input


@dataclass(frozen=True)
class BenchTarget:
    """One model.

    Attributes:
        label: of its row.
        library: `torch`, `onnx` or `tensorrt`.
        what: `folder`, or `shape`, `dtype` and `kept`; as the child process is told.
        traffic: what it reads for a token.
    """

    label: str
    library: str
    what: dict[str, Any]
    traffic: Traffic

    @staticmethod
    def of_folder(folder: Path) -> BenchTarget:
        """A checkpoint, an ONNX export or an engine.

        Raises:
            InputError: the folder is none of them, or its files are broken.
        """
        from pipeline.runtime.sessions.open_session import folder_kind

        if not folder.is_dir():
            raise InputError("There is no such folder.", where=folder)
        path = folder.resolve()
        what = {"folder": str(path)}
        label = "/".join(path.parts[-2:]).lstrip("/")
        return BenchTarget(label, folder_kind(path), what, traffic_of_folder(path))

    @staticmethod
    def of_shape(name: str, dtype: str, kept: Sequence[float]) -> list[BenchTarget]:
        """An architecture, dense for a kept fraction of 1 and with factors for others.

        Raises:
            UsageError: there is no such shape, or a fraction is outside (0, 1].
        """
        from pipeline.bench.shape_traffic import traffic_of_shape
        from pipeline.bench.shapes import find_shape

        shape = find_shape(name)
        targets = []
        for fraction in kept:
            label = f"{name} {dtype}" + (f" keep {fraction:g}" if fraction != 1 else " dense")
            what = {"shape": name, "dtype": dtype, "kept": fraction}
            targets.append(
                BenchTarget(label, "torch", what, traffic_of_shape(shape, dtype, fraction))
            )
        return targets

    def in_type(self, dtype: str) -> Traffic:
        """What an architecture reads with its weights in another type; a folder is what it is."""
        from pipeline.bench.shape_traffic import traffic_of_shape
        from pipeline.bench.shapes import find_shape

        if "shape" not in self.what:
            return self.traffic
        return traffic_of_shape(find_shape(self.what["shape"]), dtype, self.what["kept"])

    @property
    def public_what(self) -> dict[str, Any]:
        """`what` as a record that travels says it."""
        return {
            name: public_name(value) if name == "folder" else value
            for name, value in self.what.items()
        }

    def request(self, device: str, threads: int) -> dict[str, Any]:
        """What the child process is told to open."""
        kind = "shape" if "shape" in self.what else "folder"
        place = {"kind": kind, "library": self.library, "device": device, "threads": threads}
        return place | self.what

    def held_bytes(self) -> int:
        """Weights in the memory of the CPU."""
        return self.traffic.held_bytes(None if "shape" in self.what else _CPU_FLOAT_BYTES)

    def require_length(self, context: int, new_tokens: int) -> None:
        """Raise UsageError when the model cannot hold so many tokens."""
        longest = self.traffic.max_length
        if longest is not None and context + new_tokens > longest:
            raise UsageError(
                "The tokens do not fit into the model's context.",
                where=self.label,
                observed=f"{context} + {new_tokens} tokens",
                expected=f"at most {longest}",
                change="lower --prompt-tokens, --context or --new-tokens",
            )


def traffic_of_folder(folder: Path) -> Traffic:
    """Count what a checkpoint, an ONNX export or an engine reads, from its own files.

    Raises:
        pipeline.errors.InputError: the folder is none of them, or its files are broken.
    """
    from pipeline.runtime.sessions.open_session import folder_kind

    kind = folder_kind(folder)
    require_decoder(folder)
    if kind == "torch":
        from pipeline.bench.torch_traffic import traffic_of_checkpoint

        return traffic_of_checkpoint(folder)
    return _traffic_of_export(folder) if kind == "onnx" else _traffic_of_engine(folder)


def _traffic_of_export(folder: Path) -> Traffic:
    """Count an ONNX export from the initializers and the cache inputs of its graph.

    Raises:
        InputError: files are missing, or the graph is not the one that the record is for.
    """
    import onnx

    record = read_export_record(folder)
    path = folder / GRAPH_FILE
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf's errors share no base class but this one
        raise InputError("The graph cannot be read.", where=path, observed=error) from error
    _require_weights(folder, graph.initializer)
    uses = _uses_of_inputs(graph.node)
    tensors = tuple(
        _stored_tensor(initializer, uses[initializer.name]) for initializer in graph.initializer
    )
    cache = tuple(
        _cache_input(value, record) for value in graph.input if value.name.startswith(CACHE_PREFIX)
    )
    rebuilt = tuple(_rebuilt_keys(graph, record))
    return Traffic(
        tensors,
        cache,
        record.max_length,
        GRAPH_FILE,
        rebuilt,
        cache_passes=_cache_passes(record.profile),
    )


def _cache_passes(profile: str) -> int:
    """How often TensorRT moves the cache in a step."""
    return _CONCAT_PASSES if profile == COMPAT else 1


def _rebuilt_keys(graph: Any, record: ExportRecord) -> Iterable[RebuiltKeys]:
    """Of every node that rebuilds keys, by its map and the form of its latents."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    static = record.max_length if record.traits.fixed_length else None
    number_bytes = 2 if record.dtype == FLOAT16 else _CPU_FLOAT_BYTES
    rebuilding = {latent_attention_op(True, k, v): k for k in HELD_FORMS for v in HELD_FORMS}
    for node in graph.node:
        if node.op_type not in rebuilding:
            continue
        up = shapes[node.input[-4]]  # before the mean and the tables of angles
        form, (groups, _, rank, _) = rebuilding[node.op_type], up
        if form == NUMBERS:
            own: float = number_bytes * groups * rank
        else:
            own = groups * (rank // 2 if form == NIBBLES else rank) + groups * _STEPS_BYTES
        yield RebuiltKeys.of(up, own, number_bytes, static)


def _require_weights(folder: Path, initializers: Iterable[Any]) -> None:
    """Raise InputError when a file that weights are in is missing or too short."""
    ends: dict[str, int] = defaultdict(int)
    for initializer in initializers:
        place = {entry.key: entry.value for entry in initializer.external_data}
        if "location" in place:
            end = int(place.get("offset", 0)) + int(place.get("length", 0))
            ends[place["location"]] = max(ends[place["location"]], end)
    for name, end in ends.items():
        path = folder / name
        stored = path.stat().st_size if path.is_file() else 0
        if stored < end:
            raise InputError(
                "The weights of this export are missing or truncated.",
                where=path,
                observed=f"{stored} bytes",
                expected=f"at least {end}",
                change="copy the whole folder again, or export again",
            )


def _uses_of_inputs(nodes: Iterable[Any]) -> dict[str, list[_Use]]:
    """Who reads each tensor."""
    uses: dict[str, list[_Use]] = defaultdict(list)
    for node in nodes:
        for place, name in enumerate(node.input):
            uses[name].append((node.domain, node.op_type, place))
    return uses


def _stored_tensor(initializer: Any, uses: list[_Use]) -> StoredTensor:
    """An initializer, judged by the nodes that read it."""
    import onnx_ir as ir

    kind = ir.DataType(initializer.data_type)
    shape = tuple(initializer.dims)
    looked_up = bool(uses) and all(
        place in _LOOKED_UP.get(operator, ()) for _, operator, place in uses
    )
    multiplied = len(shape) >= 2 and not looked_up
    product = multiplied and any(
        domain == DOMAIN or place in _PRODUCTS.get(operator, ()) for domain, operator, place in uses
    )
    # ONNX Runtime's CPU kernels widen float16 as they load; scales of rounded weights stay.
    floating = kind == ir.DataType.FLOAT16
    return StoredTensor(
        initializer.name, shape, kind.bitwidth, looked_up, product, floating, len(uses)
    )


def _cache_input(value: Any, record: ExportRecord) -> CacheTensor:
    """Keys or values of a layer, from the graph's input [B, heads, length, width]."""
    import onnx_ir as ir

    dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    bits = ir.DataType(value.type.tensor_type.elem_type).bitwidth
    # The static cache is read to its end under a mask.
    static = record.max_length if record.traits.fixed_length else None
    return CacheTensor(dims[1] * dims[3], bits, static_length=static)


def _traffic_of_engine(folder: Path) -> Traffic:
    """Count an engine by the ONNX folder beside it that it was built from, or by its plan.

    Raises:
        InputError: the manifest is missing or broken.
    """
    manifest = read_manifest(folder)
    try:
        digest = manifest["onnx"]["sha256"]
        length = manifest["limits"]["max_length"]
        plan = StoredTensor("engine.plan", (manifest["plan"]["bytes"],), 8, floating=False)
        cache = tuple(_engine_cache(manifest))
    except (KeyError, TypeError, IndexError) as error:
        raise InputError("The manifest of this engine is broken.", where=folder) from error
    for record in sorted(folder.absolute().parent.glob(f"*/{RECORD_FILE}")):
        if read_json_object(record).get("onnx_sha256") == digest:
            counted = _traffic_of_export(record.parent)
            where = f"{record.parent.name}/{GRAPH_FILE}"
            return replace(counted, cache=cache, max_length=length, counted_from=where)
    # Kernels, and an embedding that is not the head, are counted too.
    passes = _cache_passes(manifest["onnx"]["profile"])
    return Traffic((plan,), cache, length, "engine.plan, all of it", cache_passes=passes)


def _engine_cache(manifest: dict[str, Any]) -> Iterable[CacheTensor]:
    """Keys and values of an engine, from the ranges of its decode profile."""
    bits = 16 if manifest["onnx"]["dtype"] == FLOAT16 else 32
    coded = manifest["onnx"].get("coded", [])
    own = dict.fromkeys(coded, 8) | {steps_name(name): 16 for name in coded}
    fixed = PROFILES[manifest["onnx"]["profile"]].fixed_length
    static = manifest["limits"]["max_length"] if fixed else None
    for name, ends in manifest["profiles"][0]["shapes"].items():
        if name.startswith(CACHE_PREFIX):
            _, heads, _, width = ends["max"]
            yield CacheTensor(heads * width, own.get(name, bits), static_length=static)
