"""From a checkpoint folder of an image classifier to an ONNX folder."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from pipeline.artefact import sha256_of_file, staged_folder, write_json
from pipeline.checkpoint.folder import load_checkpoint, read_recipe
from pipeline.export.contract import CONTRIB, PROFILES, Profile
from pipeline.export.passes.dequantize_linear import dequantize_linears
from pipeline.export.passes.fold_permutation import fold_permutations
from pipeline.export.passes.fuse import merge_duplicates
from pipeline.export.passes.lay_out import lay_out
from pipeline.export.passes.matmul_nbits import FORMATS, quantize_linears
from pipeline.export.trace_classifier import trace_classifier
from pipeline.export.trace_decoder import name_as_in_checkpoint
from pipeline.model.load_classifier import Shape, input_shape, load_processor
from pipeline.model.task import IMAGES
from pipeline.provenance import provenance
from pipeline.vision.stored import note_all, take_codes_, widths_of

if TYPE_CHECKING:
    from pipeline.export.export import ExportRequest


def export_images_folder(
    checkpoint: Path, output: Path, request: ExportRequest, *, overwrite: bool = False
) -> dict[str, Any]:
    """Export an image classifier to `model.onnx`, `model.onnx.data` and its processor's config.

    Args:
        checkpoint: a compressed or a plain Hugging Face folder.
        output: the folder to write.
        request: profile, dtype, weights.
        overwrite: replace `output` if it exists.

    Returns:
        export.json's content.

    Raises:
        PipelineError: a broken checkpoint, a model the exporter cannot handle, or no disk space.
    """
    from pipeline.export.export import DTYPES, GRAPH, PRODUCTS, check_graph, save_graph

    request.check()
    started = time.monotonic()
    profile = PROFILES[request.profile]
    model = load_checkpoint(checkpoint, dtype=DTYPES[request.dtype])
    shape = input_shape(model.config, str(checkpoint))
    processor = load_processor(str(checkpoint))
    codes = take_codes_(model)
    weights = request.weights_of(widths_of(model, codes))
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    with staged_folder(
        output, overwrite=overwrite, required_bytes=weight_bytes * 11 // 10
    ) as folder:
        graph = trace_classifier(model, shape, profile)
        name_as_in_checkpoint(graph.graph)
        note_all(graph.graph, codes)
        record = _transform(graph, profile, weights, PRODUCTS[request.products])
        save_graph(graph, profile, folder)
        check_graph(folder / GRAPH)
        processor.save_pretrained(folder)
        model.config.save_pretrained(folder)
        record |= _describe(graph, folder, request, shape)
        record |= {
            "checkpoint": str(checkpoint),
            "recipe": read_recipe(checkpoint),
            "weight_bytes": weight_bytes,
            "seconds": time.monotonic() - started,
        }
        write_json(folder / "export.json", record)
    return record


def _transform(graph: ir.Model, profile: Profile, weights: str, accuracy: int) -> dict[str, Any]:
    """The graph passes that are the same as a decoder's, in the same order."""
    from pipeline.export.export import STORED

    merge_duplicates(graph)
    folded, kept = fold_permutations(graph)
    quantized: dict[str, int] = {}
    if profile.contrib and weights != "float":
        quantized = quantize_linears(graph, FORMATS.get(weights), accuracy=accuracy)
        graph.opset_imports[CONTRIB] = 1
    elif weights == STORED:
        quantized = dequantize_linears(graph)
    nodes = lay_out(graph)
    return {
        "block_skip_nodes": nodes,
        "permutations": {"folded": folded, "indexed": len(kept)},
        "weights": weights,
        "accuracy_level": accuracy if quantized else None,
        "quantized": quantized,
    }


def _describe(
    graph: ir.Model, folder: Path, request: ExportRequest, shape: Shape
) -> dict[str, Any]:
    """export.json: what later stages and users want to know without opening the graph."""
    from pipeline.export.export import GRAPH, SCHEMA, WEIGHTS

    data = folder / WEIGHTS
    return {
        "schema": SCHEMA,
        "task": IMAGES,
        "profile": request.profile,
        "opset": PROFILES[request.profile].opset,
        "runs_in": PROFILES[request.profile].runs_in,
        "dtype": request.dtype,
        "pixel_values": list(shape),
        "classes": int(graph.graph.outputs[0].shape[-1]),
        "nodes": dict(Counter(node.op_type for node in graph.graph).most_common()),
        "graph_bytes": (folder / GRAPH).stat().st_size,
        "data_bytes": data.stat().st_size if data.exists() else 0,
        "onnx_sha256": sha256_of_file(folder / GRAPH),
        "data_sha256": sha256_of_file(data) if data.exists() else None,
        "provenance": provenance(),
    }
