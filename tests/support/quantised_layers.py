"""Layers of codes with random numbers in them."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from pipeline.checkpoint.modeling_quantized import QuantizedEmbedding, QuantizedLinear
from pipeline.quantize.formats import Format
from pipeline.quantize.groupwise import Blocks, quantize_blocks


def random_blocks(rows: int, columns: int, name: str, seed: int = 0) -> Blocks:
    """A normal matrix [m, n], rounded to a format."""
    weight = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    format_ = Format.parse(name)
    return quantize_blocks(weight, format_.bits, format_.width(columns), zero=format_.zero)


def fill_codes_(model: nn.Module) -> None:
    """Give every matrix of codes random ones."""
    for seed, module in enumerate(list(model.modules())):
        if isinstance(module, QuantizedLinear | QuantizedEmbedding) and hasattr(module, "stored"):
            held = module.stored
            blocks = random_blocks(held.rows, held.columns, held.format_name, seed)
            held.load_state_dict(blocks.stored_tensors())
            assert torch.isfinite(held.values(torch.float32)).all()
            held._held = None
