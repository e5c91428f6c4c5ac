"""The ONNX folder an engine is built from, read and checked without loading its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import InputError
from pipeline.export.contract import (
    BLOCK_A,
    BLOCK_B,
    BLOCK_SKIP_OPS,
    CACHE_WRITE,
    COMPAT,
    CPU,
    DEQUANTIZE,
    DEQUANTIZED_SKIP_OPS,
    DOMAIN,
    FLOAT16,
    GRAPH_FILE,
    LATENT_OPS,
    OPSET24,
    QUANTIZED_OPS,
    RECORD_FILE,
)
from pipeline.export.record import (
    ExportRecord,
    read_export_record,
    require_weights,
    wrong_field,
)
from pipeline.json_file import read_json_object
from pipeline.known_hashes import known_sha256
from pipeline.model.task import TASKS

if TYPE_CHECKING:
    import onnx

_CONV = "Conv"


@dataclass(frozen=True)
class OnnxFolder:
    """An exported graph, ready to be built.

    Attributes:
        path: the folder.
        record: the checked part of `export.json`.
        inputs: shape of every graph input, None where dynamic.
        block_skip_nodes: how many block-skip nodes the graph holds.
        data_files: the external weight files, absolute.
        quantized_nodes: how many block-skip nodes there are beside, with a factor that
            DequantizeLinear reads from codes.
        dequantized: matrices that it reads.
        latent_nodes: attention to latents that a plugin may take.
        cache_nodes: nodes that write a cache of fixed length.
        coded_nodes: nodes of our ops that hold codes for the kernels.
        coded_matrices: matrices that these hold.
        int8_convs: names of convolutions whose kernels and inputs are codes.
        float_convs: of all others.
    """

    path: Path
    record: ExportRecord
    inputs: dict[str, tuple[int | None, ...]]
    block_skip_nodes: int
    data_files: tuple[Path, ...]
    quantized_nodes: int = 0
    dequantized: int = 0
    latent_nodes: int = 0
    cache_nodes: int = 0
    coded_nodes: int = 0
    coded_matrices: int = 0
    int8_convs: tuple[str, ...] = ()
    float_convs: tuple[str, ...] = ()

    @property
    def onnx_path(self) -> Path:
        return self.path / GRAPH_FILE

    @property
    def weight_bytes(self) -> int:
        """Bytes of graph and weights on disk."""
        return sum(path.stat().st_size for path in (self.onnx_path, *self.data_files))

    @property
    def plugin_nodes(self) -> int:
        """Nodes that a plugin may take."""
        return self.block_skip_nodes + self.latent_nodes + self.cache_nodes + self.coded_nodes

    def data_sha256(self) -> dict[str, str]:
        """Hex SHA-256 of each weight file, by file name.

        Raises:
            InputError: they are not those that the export wrote.
        """
        require_weights(self.path, self.record, known=False)
        return {path.name: known_sha256(path) for path in self.data_files}

    def require_float16(self) -> None:
        """Raise InputError for an export that TensorRT cannot build, before it is asked to."""
        if self.record.traits.contrib:
            raise InputError(
                "This export has ONNX Runtime's own operators, which TensorRT does not know.",
                where=self.path,
                observed=f"profile {CPU}",
                expected=f"profile {OPSET24} or {COMPAT}, {FLOAT16}",
                change="export the checkpoint again with --dtype float16, without --profile cpu",
            )
        if self.record.dtype != FLOAT16 and not self.int8_convs:
            raise InputError(
                f"TensorRT engines are built from a float16 export, and this one is "
                f"{self.record.dtype}: the fused attention and cache layers have no "
                "float32 kernels ('not supported by a dedicated kernel').",
                where=self.path,
                observed=self.record.dtype,
                expected=FLOAT16,
                change="export the checkpoint again with --dtype float16",
            )

    def require_cache_in_place(self) -> None:
        """Raise InputError for a cache that TensorRT cannot write codes into."""
        writes = self.record.traits.fixed_length and not self.record.traits.plugin_writes
        if self.record.coded and writes:
            raise InputError(
                "TensorRT writes no codes into a cache of fixed length.",
                where=self.path,
                observed=f"profile {self.record.profile}, and latents of few bits",
                expected=f"profile {COMPAT}, whose cache grows",
                change=f"export the checkpoint again with --profile {COMPAT}",
            )


def read_onnx_folder(folder: Path) -> OnnxFolder:
    """Read and check an exported folder.

    Raises:
        InputError: files missing, not matching each other, or not what `export.json` promises.
    """
    folder = folder.resolve()
    record = read_export_record(folder, tasks=tuple(TASKS))
    model = load_graph(folder / GRAPH_FILE)
    found = _count_nodes(model, BLOCK_SKIP_OPS)
    _require_node_count(folder / RECORD_FILE, found)
    int8_convs, float_convs = _convs(model)
    return OnnxFolder(
        folder,
        record,
        _input_shapes(model),
        found,
        data_files(model, folder),
        _count_nodes(model, DEQUANTIZED_SKIP_OPS),
        # Of rounded convolutions it reads activations, too, and has no matrix.
        0 if int8_convs else _count_nodes(model, (DEQUANTIZE,), domain=""),
        sum(takes_plugin(node) for node in model.graph.node),
        _count_nodes(model, (CACHE_WRITE,)),
        _count_nodes(model, QUANTIZED_OPS),
        sum(map(_coded_matrices, model.graph.node)),
        int8_convs,
        float_convs,
    )


def load_graph(path: Path) -> onnx.ModelProto:
    """Parse the graph alone.

    Raises:
        InputError: not an ONNX file.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise InputError("This file is not ONNX.", where=path, observed=error) from error


def _input_shapes(model: onnx.ModelProto) -> dict[str, tuple[int | None, ...]]:
    """Shape of every graph input, None where the axis has a name or nothing."""
    return {
        value.name: tuple(
            dim.dim_value if dim.HasField("dim_value") else None
            for dim in value.type.tensor_type.shape.dim
        )
        for value in model.graph.input
    }


def _convs(model: onnx.ModelProto) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of convolutions, those first that read an input and a kernel out of codes."""
    made_by = {name: node.op_type for node in model.graph.node for name in node.output}
    convs = [node for node in model.graph.node if node.op_type == _CONV]
    rounded = [all(made_by.get(x) == DEQUANTIZE for x in node.input[:2]) for node in convs]
    pairs = list(zip(convs, rounded, strict=True))
    int8, other = (tuple(n.name for n, own in pairs if own is kind) for kind in (True, False))
    return int8, other


def takes_plugin(node: onnx.NodeProto) -> bool:
    """Whether a node is attention to latents, of shapes that the plugin's kernels take."""
    return (
        node.domain == DOMAIN
        and node.op_type in LATENT_OPS
        and any(attribute.name == "plugin_namespace" for attribute in node.attribute)
    )


def _coded_matrices(node: onnx.NodeProto) -> int:
    """Matrices of codes that a node of ours holds."""
    ours = node.domain == DOMAIN and node.op_type in QUANTIZED_OPS
    return sum(item.name in (BLOCK_A, BLOCK_B) for item in node.attribute) if ours else 0


def _count_nodes(model: onnx.ModelProto, op_types: tuple[str, ...], domain: str = DOMAIN) -> int:
    """Nodes of the main graph of some types."""
    return sum(node.domain == domain and node.op_type in op_types for node in model.graph.node)


def _require_node_count(record_path: Path, found: int) -> None:
    """Raise InputError when `export.json` promises another number of block-skip nodes."""
    promised = read_json_object(record_path).get("block_skip_nodes")
    if promised != found:
        raise wrong_field(record_path, "block_skip_nodes", promised, f"{found}, as in {GRAPH_FILE}")


def data_files(model: onnx.ModelProto, folder: Path) -> tuple[Path, ...]:
    """The files that the initializers lie in.

    Raises:
        InputError: one of them is missing.
    """
    names = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    paths = tuple(folder / name for name in sorted(names))
    for path in paths:
        if not path.is_file():
            raise InputError(
                f"The weights {path.name} are missing.",
                where=folder,
                change="copy the whole ONNX folder, or export the checkpoint again",
            )
    return paths
