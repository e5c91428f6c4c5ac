"""Matrices that a classifier's checkpoint holds in few bits, ready to be exported as they are."""

from __future__ import annotations

from functools import partial

import onnx_ir as ir
import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.checkpoint.modeling_skipcat import FewBitLinear, FewBits
from pipeline.export.passes.weights import StoredCodes, note_codes
from pipeline.quantize.formats import Format, parse_format
from pipeline.quantize.groupwise import Blocks
from pipeline.quantize.packing import blocks_of


def take_codes_(model: PreTrainedModel) -> dict[str, StoredCodes]:
    """Put ordinary matrices in the place of those in few bits, and return their codes by name.

    Args:
        model: changed in place: it computes what it did.

    Returns:
        Parameter name -> the codes that it stands for.
    """
    found = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, FewBitLinear):
            weight = module.weight.detach()
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            if module.bias is not None:
                linear.bias = module.bias
            model.set_submodule(name, linear)
            read = partial(_blocks, module.matrix)
            found[f"{name}.weight"] = StoredCodes(parse_format(module.matrix.style), read)
    return found


def _blocks(matrix: FewBits) -> Blocks:
    return blocks_of(dict(matrix.named_buffers()), parse_format(matrix.style), matrix.columns)


def widths_of(model: PreTrainedModel, codes: dict[str, StoredCodes]) -> dict[Format, set[int]]:
    """Columns of the matrices in each format."""
    widths: dict[Format, set[int]] = {}
    for name, stored in codes.items():
        weight: torch.Tensor = model.get_parameter(name)
        widths.setdefault(stored.style, set()).add(weight.shape[1])
    return widths


def note_all(graph: ir.Graph, codes: dict[str, StoredCodes]) -> None:
    """Give the weights of a traced graph, named as in the model, the codes they stand for."""
    for name, stored in codes.items():
        note_codes(graph.initializers[name], stored)
