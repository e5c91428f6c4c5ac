"""What a checkpoint's matrices are stored in, or could be without being rounded."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.checkpoint.skeleton import FewBitMatrix, Skeleton
from pipeline.export.passes.matmul_nbits import FORMATS, OFFSET
from pipeline.quantize.formats import Format
from pipeline.quantize.groupwise import is_kept_by

SAMPLED_ROWS = 32


def few_bit_widths(skeleton: Skeleton) -> dict[Format, set[int]]:
    """Formats of the matrices that are in few bits, and the columns of those in each."""
    widths: dict[Format, set[int]] = {}
    for matrix in skeleton.matrices.values():
        if isinstance(matrix, FewBitMatrix):
            widths.setdefault(matrix.style, set()).add(matrix.shape[1])
    return widths


def is_in_four_bits(skeleton: Skeleton) -> bool:
    """Whether a sample of rows of every layer's matrices loses nothing in 4 bits with offsets.

    Models read from GGUF files of that kind are; others are found out by their first matrix.
    """
    tables = (skeleton.model.get_input_embeddings(), skeleton.model.get_output_embeddings())
    others = {
        name: matrix
        for name, matrix in skeleton.matrices.items()
        if skeleton.model.get_submodule(name.removesuffix(".weight")) not in tables
    }
    return bool(others) and all(
        is_kept_by(FORMATS[OFFSET], _some_rows(matrix.read())) for matrix in others.values()
    )


def _some_rows(matrix: torch.Tensor) -> np.ndarray:
    rows: np.ndarray = matrix[:: max(1, len(matrix) // SAMPLED_ROWS)].float().numpy()
    return rows
