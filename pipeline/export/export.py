"""From a checkpoint folder to an ONNX folder: trace, passes, checks, and the files beside it."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch

from pipeline.artefact import copy_tokenizer, sha256_of_file, staged_folder, write_json
from pipeline.checkpoint.folder import read_recipe
from pipeline.checkpoint.skeleton import load_skeleton
from pipeline.errors import InputError, UsageError
from pipeline.export.block_skip import BLOCKED_OPSET, DOMAIN, VERSION, function_bodies
from pipeline.export.contract import CONTRIB, PROFILES, Profile
from pipeline.export.genai import genai_config
from pipeline.export.passes.dequantize_linear import dequantize_linears
from pipeline.export.passes.fold_permutation import fold_permutations
from pipeline.export.passes.fuse import fuse_operators, merge_duplicates
from pipeline.export.passes.group_query_attention import simplify_attention
from pipeline.export.passes.last_logits import choose_first_logit
from pipeline.export.passes.lay_out import lay_out
from pipeline.export.passes.matmul_nbits import FORMATS, INTEGER_PRODUCTS, OFFSET, quantize_linears
from pipeline.export.passes.skip_norm import fuse_residual_norms
from pipeline.export.quantized_weights import few_bit_widths, is_in_four_bits
from pipeline.export.trace_decoder import CacheShape, trace
from pipeline.model.task import IMAGES, task_of_folder
from pipeline.progress import note
from pipeline.provenance import provenance
from pipeline.quantize.formats import RUNTIMES, Format

SCHEMA = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16}
STORED = "stored"
WEIGHTS_AS = ("float", *FORMATS, STORED)
# What `accuracy_level` of ONNX Runtime's products each is.
PRODUCTS = {"integer": INTEGER_PRODUCTS, "float": 0}
GRAPH, WEIGHTS = "model.onnx", "model.onnx.data"
# Below this a tensor stays inside the graph file: shape constants must, for some runtimes.
EXTERNAL_BYTES = 1024


@dataclass(frozen=True)
class ExportRequest:
    """What graph to make.

    Attributes:
        profile: name in `PROFILES`.
        dtype: "float32" for the CPU, "float16" for TensorRT.
        max_length: slots of the static cache, prompt and answer together.
        weights: "float", which is as `dtype` says, "int8", "int4", "int4-offset", or "stored": the
            codes that the checkpoint holds. None is "stored" where the runtime takes them; else
            float, but in the profile `cpu`, which alone has the operators for it, int8, or
            int4-offset where that rounds nothing.
        products: of matrices in few bits in the profile `cpu`: "integer" rounds inputs to 8 bits
            and is fast, "float" multiplies in float32.
    """

    profile: str = "opset24"
    dtype: str = "float32"
    max_length: int = 2048
    weights: str | None = None
    products: str = "integer"

    @property
    def stored_weights(self) -> str:
        """How the matrices are stored, of a checkpoint that holds none in few bits."""
        return self.weights or ("int8" if self.profile == "cpu" else "float")

    def weights_of(self, widths: dict[Format, set[int]]) -> str:
        """How the matrices are stored, of a checkpoint that holds some in few bits.

        Args:
            widths: format -> columns of the matrices that are in it.

        Raises:
            UsageError: the runtimes of the profile do not take them, or there are none to keep.
        """
        if not widths:
            if self.weights == STORED:
                raise UsageError(
                    "The checkpoint holds no matrix in few bits.",
                    where="--weights stored",
                    change="leave --weights out, or compress with --memory or --weights",
                )
            return self.stored_weights
        runtime = RUNTIMES["cpu" if self.profile == "cpu" else "tensorrt"]
        others = sorted(
            style.name
            for style, columns in widths.items()
            if not all(runtime.accepts(style, count) for count in columns)
        )
        takes = not others and PROFILES[self.profile].opset >= BLOCKED_OPSET
        if self.weights in FORMATS:
            raise UsageError(
                "The checkpoint's matrices are in few bits already.",
                where="--weights",
                observed=f"{self.weights}, of {', '.join(sorted(style.name for style in widths))}",
                change="leave --weights out",
            )
        if takes:
            return self.weights or STORED
        if self.profile == "cpu" or self.weights == STORED:
            raise UsageError(
                "The runtime does not take the checkpoint's formats.",
                where=f"--profile {self.profile}",
                observed=", ".join(others) or "blocks, which opset 21 is the first to have",
                expected=runtime.takes,
                change=f"compress with --runtime {runtime.name}, or pass --weights float with "
                "--profile opset24, which undoes the rounding's savings",
            )
        if self.weights is None:
            note(
                f"weights are exported as {self.dtype}, not in few bits: --profile {self.profile} "
                f"takes {runtime.takes}; the checkpoint has {', '.join(others) or 'blocks'}"
            )
        return "float"

    def check(self) -> None:
        """Refuse what no graph can be made for.

        Raises:
            UsageError: names the value and what is possible.
        """
        for flag, value, choices in (
            ("--profile", self.profile, PROFILES),
            ("--dtype", self.dtype, DTYPES),
            ("--weights", self.stored_weights, WEIGHTS_AS),
            ("--products", self.products, PRODUCTS),
        ):
            if value not in choices:
                raise UsageError(
                    "Unknown choice.", where=flag, observed=value, expected=", ".join(choices)
                )
        if self.profile != "cpu" and self.stored_weights in FORMATS:
            raise UsageError(
                "Only ONNX Runtime's own operators hold weights of few bits.",
                where="--weights",
                observed=f"{self.weights}, with --profile {self.profile}",
                change="pass --profile cpu, or leave --weights out",
            )
        if self.profile == "cpu" and self.dtype != "float32":
            raise UsageError(
                "On the CPU everything but the weights is computed in float32.",
                where="--dtype",
                observed=f"{self.dtype}, with --profile cpu",
                change="leave --dtype out",
            )
        if self.max_length < 2:
            raise UsageError(
                "The cache is too short.", where="--max-length", observed=self.max_length
            )


def export_folder(
    checkpoint: Path, output: Path, request: ExportRequest, *, overwrite: bool = False
) -> dict[str, Any]:
    """Export a checkpoint to `model.onnx`, `model.onnx.data` and the files that runtimes want.

    Args:
        checkpoint: a compressed or a plain Hugging Face folder.
        output: the folder to write.
        request: profile, dtype, cache length.
        overwrite: replace `output` if it exists.

    Returns:
        export.json's content.

    Raises:
        PipelineError: a broken checkpoint, a model the exporter cannot handle, or no disk space.
    """
    if task_of_folder(Path(checkpoint)) == IMAGES:
        from pipeline.vision.export import export_images_folder

        return export_images_folder(Path(checkpoint), output, request, overwrite=overwrite)
    request.check()
    started = time.monotonic()
    profile, dtype = PROFILES[request.profile], DTYPES[request.dtype]
    skeleton = load_skeleton(Path(checkpoint), dtype)
    weights = request.weights_of(few_bit_widths(skeleton))
    undecided = request.weights is None and weights in FORMATS
    exact = (undecided or weights == OFFSET) and is_in_four_bits(skeleton)
    if exact and undecided:
        weights = OFFSET
        note(
            f"weights are exported as {OFFSET}: the checkpoint's own are on such grids, so 4 bits "
            "round nothing; --weights int8 takes 8"
        )
    config = skeleton.model.config
    max_length = _bounded_length(request.max_length, config)
    weight_bytes = sum(p.numel() * p.element_size() for p in skeleton.model.parameters())
    with staged_folder(
        output, overwrite=overwrite, required_bytes=weight_bytes * 11 // 10
    ) as folder:
        graph, shapes = trace(skeleton, profile, max_length)
        record = _transform(graph, profile, weights, PRODUCTS[request.products], max_length)
        save_graph(graph, profile, folder)
        check_graph(folder / GRAPH)
        copy_tokenizer(Path(checkpoint), folder)
        config.save_pretrained(folder)
        write_json(folder / "genai_config.json", genai_config(config, profile, shapes, max_length))
        record |= _describe(graph, folder, request, shapes, max_length)
        record |= {
            "checkpoint": str(checkpoint),
            "recipe": read_recipe(Path(checkpoint)),
            "weight_bytes": weight_bytes,
            "exact_weights": exact,
            "seconds": time.monotonic() - started,
        }
        write_json(folder / "export.json", record)
    return record


def _bounded_length(wanted: int, config: Any) -> int:
    """The cache length, never beyond the positions that the model was made for."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or wanted
    return min(wanted, limit)


def _transform(
    graph: ir.Model, profile: Profile, weights: str, accuracy: int, max_length: int
) -> dict[str, Any]:
    """All graph passes, in the order they depend on one another."""
    fused = fuse_operators(graph) if profile.native_attention else {}
    merge_duplicates(graph)
    folded, kept = fold_permutations(graph)
    if profile.contrib:
        fused |= simplify_attention(graph, max_length)
        fused["SkipSimplifiedLayerNormalization"] = fuse_residual_norms(graph)
        fused["first_logit"] = choose_first_logit(graph)
        graph.opset_imports[CONTRIB] = VERSION
    quantized: dict[str, int] = {}
    if profile.contrib and weights != "float":
        quantized = quantize_linears(graph, FORMATS.get(weights), accuracy=accuracy)
    elif weights == STORED:
        quantized = dequantize_linears(graph)
    nodes = lay_out(graph)
    return {
        "block_skip_nodes": nodes,
        "fused": fused,
        "permutations": {"folded": folded, "indexed": len(kept)},
        "weights": weights,
        "accuracy_level": accuracy if quantized else None,
        "quantized": quantized,
    }


def save_graph(graph: ir.Model, profile: Profile, folder: Path) -> None:
    """Add the function bodies and write graph and weights.

    Raises:
        OSError: the disk is full.
    """
    used = {node.op_type for node in graph.graph if node.domain == DOMAIN}
    for name, body in function_bodies(profile.opset).items():
        if name in used:
            graph.functions[body.identifier()] = body
    if used:
        graph.opset_imports[DOMAIN] = VERSION
    graph.producer_name = "skipcat"
    graph.metadata_props["skipcat.profile"] = profile.name
    ir.save(
        graph,
        folder / GRAPH,
        external_data=WEIGHTS,
        size_threshold_bytes=EXTERNAL_BYTES,
    )


def check_graph(path: Path) -> None:
    """Run onnx's checker with shape inference on the file as written.

    Raises:
        InputError: what the checker says.
    """
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InputError(
            "The exported graph is not valid ONNX.",
            where=path,
            observed=str(error).strip().splitlines()[0],
            change="please report this with the model's config.json",
        ) from error


def _describe(
    graph: ir.Model, folder: Path, request: ExportRequest, shapes: list[CacheShape], max_length: int
) -> dict[str, Any]:
    """export.json: what later stages and users want to know without opening the graph."""
    logits = graph.graph.outputs[0]
    counts = Counter(node.op_type for node in graph.graph)
    return {
        "schema": SCHEMA,
        "profile": request.profile,
        "opset": PROFILES[request.profile].opset,
        "runs_in": PROFILES[request.profile].runs_in,
        "dtype": request.dtype,
        "max_length": max_length,
        "vocab_size": int(logits.shape[-1]),
        "num_layers": len(shapes),
        "cache": [asdict(shape) for shape in shapes],
        "nodes": dict(counts.most_common()),
        "graph_bytes": (folder / GRAPH).stat().st_size,
        "data_bytes": (folder / WEIGHTS).stat().st_size if (folder / WEIGHTS).exists() else 0,
        "onnx_sha256": sha256_of_file(folder / GRAPH),
        "data_sha256": sha256_of_file(folder / WEIGHTS) if (folder / WEIGHTS).exists() else None,
        "provenance": provenance(),
    }
