"""What a checkpoint's matrices are stored in, or could be without being rounded."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.checkpoint.skeleton import QuantizedMatrix, Skeleton, StoredMatrix
from pipeline.export.contract import INT4_OFFSET, ROUNDED
from pipeline.export.passes.matmul_nbits import FORMATS
from pipeline.export.request import ExportRequest
from pipeline.progress import note
from pipeline.quantize.formats import Format
from pipeline.quantize.groupwise import is_kept_by

_SAMPLED_ROWS = 32


def chosen_weights(request: ExportRequest, skeleton: Skeleton) -> tuple[str, bool]:
    """How the graph stores the matrices, and whether rounding them so is known to lose nothing.

    Raises:
        UsageError: the runtimes of the profile do not take the checkpoint's formats.
    """
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
