"""A matrix in few bits as the tensors that a checkpoint holds, and back.

`{name}.codes`, `{name}.scales` and, in formats that have them, `{name}.zero_points`, as
`pipeline.compress.modeling_skipcat.FewBits` registers them.
"""

from __future__ import annotations

import numpy as np
import torch

from pipeline.quantize.blocks import Blocks
from pipeline.quantize.formats import Format
from pipeline.quantize.pack import pack_codes, unpack_codes

CODES, SCALES, ZERO_POINTS = "codes", "scales", "zero_points"


def stored_tensors(blocks: Blocks) -> dict[str, torch.Tensor]:
    """Codes uint8 [m, bytes], scales int16 [m, blocks], zero points uint8 [m, bytes] or none."""
    rows = len(blocks.codes)
    tensors = {
        CODES: torch.from_numpy(pack_codes(blocks.codes.reshape(rows, -1), blocks.bits)),
        SCALES: torch.from_numpy(blocks.scales.astype(np.float16).view(np.int16)),
    }
    if blocks.zero_points is not None:
        tensors[ZERO_POINTS] = torch.from_numpy(pack_codes(blocks.zero_points, blocks.bits))
    return tensors


def blocks_of(tensors: dict[str, torch.Tensor], style: Format, columns: int) -> Blocks:
    """The inverse of `stored_tensors`.

    Args:
        tensors: by the names it gives them.
        style: the format they are in.
        columns: n of the matrix.
    """
    width, count = style.width(columns), style.blocks(columns)
    codes = unpack_codes(tensors[CODES].numpy(), style.bits, count * width)
    scales = tensors[SCALES].numpy().view(np.float16).astype(np.float32)
    zero_points = None
    if not style.symmetric:
        zero_points = unpack_codes(tensors[ZERO_POINTS].numpy(), style.bits, count)
    return Blocks(codes.reshape(len(codes), count, width), scales, zero_points, style.bits, columns)


def rows_of(blocks: Blocks, start: int, stop: int) -> Blocks:
    """Some rows of a matrix in few bits."""
    zero_points = None if blocks.zero_points is None else blocks.zero_points[start:stop]
    part = blocks.codes[start:stop], blocks.scales[start:stop], zero_points
    return Blocks(*part, blocks.bits, blocks.columns)
