"""Whether a matrix is on the grids of a format already, as one read from a GGUF file may be."""

from __future__ import annotations

import numpy as np

from pipeline.quantize.blocks import dequantize_blocks, pad_to_blocks, quantize_blocks
from pipeline.quantize.formats import Format

# Half a step of 8 bits over -max|w| to max|w|.
HALF_STEP_OF_8_BITS = 1 / 254


def is_kept_by(style: Format, weight: np.ndarray) -> bool:
    """Whether no weight is changed by more than rounding its block to 8 bits may change it.

    Weights that were on such grids and were then stored in float16 or bfloat16 pass, too.

    Args:
        style: the format.
        weight: float [m, n].
    """
    width = style.width(weight.shape[1])
    rounded = dequantize_blocks(quantize_blocks(weight, style.bits, width, zero=style.zero))
    error = np.abs(pad_to_blocks(rounded - weight, width)).max(axis=-1)
    largest = np.abs(pad_to_blocks(weight, width)).max(axis=-1)
    return bool((error <= largest * HALF_STEP_OF_8_BITS).all())
