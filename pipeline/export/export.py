"""From a checkpoint folder to an ONNX folder: trace, passes, checks, and the files beside it."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from transformers import PreTrainedConfig

from pipeline.artefact import sha256_of_file, staged_folder, write_json
from pipeline.checkpoint.folder import read_record
from pipeline.checkpoint.skeleton import QuantizedMatrix, Skeleton, StoredMatrix
from pipeline.errors import InputError
from pipeline.export import block_skip, cache_write, latent_attention, matmul_blocks
from pipeline.export.contract import (
    CONTRIB,
    DOMAIN,
    FLOAT,
    GRAPH_FILE,
    INT4_OFFSET,
    OP_VERSION,
    PRODUCTS,
    RECORD_FILE,
    ROUNDED,
    SCHEMA,
    STORED,
    WEIGHTS_FILE,
    Profile,
)
from pipeline.export.int8_nodes import require_int8_runtime
from pipeline.export.latents import refuse_latents_in
from pipeline.export.passes.fold_permutation import fold_permutations
from pipeline.export.passes.fuse import merge_duplicates
from pipeline.export.passes.keep_codes import keep_codes
from pipeline.export.passes.lay_out import lay_out
from pipeline.export.passes.matmul_nbits import FORMATS, quantize_linears
from pipeline.export.prove import prove
from pipeline.export.request import ExportRequest
from pipeline.export.rounded_cache import calibrated_cache
from pipeline.export.tracing import Traced
from pipeline.known_hashes import remember_sha256
from pipeline.model.task import adapter_of, require_decoder, task_of_folder
from pipeline.progress import note
from pipeline.provenance import provenance, public_name
from pipeline.quantize.formats import Format
from pipeline.quantize.groupwise import is_kept_by

# Below this a tensor stays inside the graph file: shape constants must, for some runtimes.
_EXTERNAL_BYTES = 1024
_SAMPLED_ROWS = 32
# The exporter notes by which lines of which files, named as they lie on this machine.
_STACK_TRACE = "pkg.torch.onnx.stack_trace"


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
    request.check()
    started = time.monotonic()
    checkpoint = Path(checkpoint)
    skeleton = Skeleton.load(
        checkpoint,
        getattr(torch, request.dtype),
        trust_remote_code=request.trust_remote_code,
    )
    weights, exact = _chosen_weights(request, skeleton)
    require_int8_runtime(skeleton.model, request.traits.formats_of, checkpoint)
    if request.cache != FLOAT:
        require_decoder(checkpoint)
    refuse_latents_in(request.traits, skeleton.model, rounds=request.cache != FLOAT)
    proof = prove_model(skeleton.model.config, request)
    calibrated: dict[str, Any] = {}
    if request.cache != FLOAT:
        rounding, calibrated["cache_rounding"] = calibrated_cache(checkpoint, request)
        request = replace(request, rounding=rounding)
    weight_bytes = sum(p.numel() * p.element_size() for p in skeleton.model.parameters())
    with staged_folder(
        output,
        overwrite=overwrite,
        inputs=(checkpoint,),
        required_bytes=weight_bytes * 11 // 10,
    ) as folder:
        traced, record = _write_graph(skeleton, request, weights, folder)
        if bound := traced.record.get("max_length_bound"):
            note(f"the cache holds {traced.record['max_length']} tokens at most: {bound}")
        traced.write_files(folder)
        skeleton.model.config.save_pretrained(folder)
        record |= _describe(traced, request, folder) | calibrated
        record |= {
            "checkpoint": public_name(checkpoint),
            "recipe": read_record(checkpoint, "recipe.json"),
            "weight_bytes": weight_bytes,
            "exact_weights": exact,
            "proof": proof,
            "seconds": time.monotonic() - started,
        }
        write_json(folder / RECORD_FILE, record)
    return record


def prove_model(config: PreTrainedConfig, request: ExportRequest) -> dict[str, Any]:
    """Prove, in seconds, that what a request makes of a model computes what the model computes.

    Args:
        config: of the model; its weights are not needed.
        request: profile, dtype, cache length.

    Returns:
        What export.json says of it.

    Raises:
        InputError: it does not, or the model cannot be exported at all.
    """

    def write(skeleton: Skeleton, wanted: ExportRequest, folder: Path) -> dict[str, Any]:
        return _write_graph(skeleton, wanted, FLOAT, folder)[0].record

    return prove(config, request, write)


def _write_graph(
    skeleton: Skeleton, request: ExportRequest, weights: str, folder: Path
) -> tuple[Traced, dict[str, Any]]:
    """Trace, transform, write and check; what was traced, and what was done to it."""
    trace = adapter_of(task_of_folder(skeleton.folder), "export")
    traced: Traced = trace(skeleton, request)
    record = _transform(traced, request, weights)
    _save_graph(traced.graph, request.traits, folder)
    _check_graph(folder / GRAPH_FILE, request)
    return traced, record


def _transform(traced: Traced, request: ExportRequest, weights: str) -> dict[str, Any]:
    """All graph passes, in the order they depend on one another."""
    graph, fusions = traced.graph, traced.fusions
    fused: dict[str, int] = {}
    for apply in fusions.traced if fusions else ():
        fused |= apply(graph)
    merge_duplicates(graph)
    folded, kept = fold_permutations(graph)
    for apply in fusions.folded if fusions else ():
        fused |= apply(graph)
    accuracy = PRODUCTS[request.products]
    quantized: dict[str, int] = {}
    if request.traits.contrib and weights != FLOAT:
        quantized = quantize_linears(graph, FORMATS.get(weights), accuracy=accuracy)
    elif weights == STORED:
        quantized = keep_codes(graph)
    nodes = lay_out(graph)
    return {
        "block_skip_nodes": nodes,
        **({"fused": fused} if fusions else {}),
        "permutations": {"folded": folded, "indexed": len(kept)},
        "weights": weights,
        "accuracy_level": accuracy if quantized else None,
        "quantized": quantized,
    }


def _save_graph(graph: ir.Model, profile: Profile, folder: Path) -> None:
    """Add the function bodies and write graph and weights.

    Raises:
        OSError: the disk is full.
    """
    if profile.contrib:
        graph.opset_imports[CONTRIB] = 1
    used = {node.op_type for node in graph.graph if node.domain == DOMAIN}
    for module in (block_skip, cache_write, latent_attention, matmul_blocks):
        for body in module.function_bodies(profile.opset, used).values():
            graph.functions[body.identifier()] = body
    if used:
        graph.opset_imports[DOMAIN] = OP_VERSION
    for node in graph.graph.all_nodes():
        node.metadata_props.pop(_STACK_TRACE, None)
    graph.producer_name = "skipcat"
    graph.metadata_props["skipcat.profile"] = profile.name
    ir.save(
        graph,
        folder / GRAPH_FILE,
        external_data=WEIGHTS_FILE,
        size_threshold_bytes=_EXTERNAL_BYTES,
    )


def _check_graph(path: Path, request: ExportRequest) -> None:
    """Run onnx's checker with shape inference on the file as written.

    Raises:
        InputError: what the checker says.
    """
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InputError(
            "The exported graph is not valid ONNX.",
            where=f"--profile {request.profile}, {request.dtype}",
            observed=f"onnx's checker refuses it ({type(error).__name__})",
            change="please report this with the model's config.json and what -v shows",
        ) from error


def _describe(traced: Traced, request: ExportRequest, folder: Path) -> dict[str, Any]:
    """export.json: what later stages and users want to know without opening the graph."""
    data = folder / WEIGHTS_FILE
    data_sha256 = sha256_of_file(data) if data.exists() else None
    if data_sha256 is not None:
        remember_sha256(data, data_sha256)
    counts = Counter(node.op_type for node in traced.graph.graph)
    return {
        "schema": SCHEMA,
        "profile": request.profile,
        "opset": request.traits.opset,
        "runs_in": request.runs_in,
        "dtype": request.dtype,
        **traced.record,
        "nodes": dict(counts.most_common()),
        "graph_bytes": (folder / GRAPH_FILE).stat().st_size,
        "data_bytes": data.stat().st_size if data.exists() else 0,
        "onnx_sha256": sha256_of_file(folder / GRAPH_FILE),
        "data_sha256": data_sha256,
        "provenance": provenance(),
    }


def _chosen_weights(request: ExportRequest, skeleton: Skeleton) -> tuple[str, bool]:
    """How the graph stores the matrices, and whether rounding them so is known to lose nothing.

    Raises:
        UsageError: the runtimes of the profile do not take the checkpoint's formats.
    """
    if request.weights is None and not _linear_layers(skeleton):
        return FLOAT, True  # what an export rounds are products with matrices
    weights = request.weights_of(_widths(skeleton))
    undecided = request.weights is None and weights in ROUNDED
    exact = (undecided or weights == INT4_OFFSET) and _is_in_four_bits(skeleton)
    if exact and undecided:
        weights = INT4_OFFSET
        note(
            f"weights are exported as {weights}: the checkpoint's own are on such grids, so 4 bits "
            "round nothing; --weights int8 takes 8"
        )
    return weights, exact


def _widths(skeleton: Skeleton) -> dict[Format, set[int]]:
    """Formats of the quantised matrices, and the columns of those in each."""
    widths: dict[Format, set[int]] = {}
    for matrix in skeleton.matrices.values():
        if isinstance(matrix, QuantizedMatrix):
            widths.setdefault(matrix.format, set()).add(matrix.shape[1])
    return widths


def _is_in_four_bits(skeleton: Skeleton) -> bool:
    """Whether a sample of rows of every linear layer's matrix loses nothing in 4 bits with offsets.

    Models read from GGUF files of that kind are; others are found out by their first matrix.
    """
    layers = _linear_layers(skeleton)
    return bool(layers) and all(
        is_kept_by(FORMATS[INT4_OFFSET], _some_rows(matrix.read())) for matrix in layers
    )


def _linear_layers(skeleton: Skeleton) -> list[StoredMatrix]:
    """Every matrix that is neither the embedding's nor the head's, nor a convolution's."""
    model = skeleton.model
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [
        matrix
        for name, matrix in skeleton.matrices.items()
        if len(matrix.shape) == 2 and model.get_submodule(name.rpartition(".")[0]) not in ends
    ]


def _some_rows(matrix: torch.Tensor) -> np.ndarray:
    rows: np.ndarray = matrix[:: max(1, len(matrix) // _SAMPLED_ROWS)].float().numpy()
    return rows
