"""Back to ordinary matrices: no smaller, but loadable by every other tool."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from pipeline.compress.checkpoint import load_checkpoint, read_report, save_checkpoint
from pipeline.compress.modeling_skipcat import FactoredLinear


def densify_(model: PreTrainedModel) -> PreTrainedModel:
    """Replace every factored layer by an nn.Linear that holds the product of its factors.

    Args:
        model: changed in place, and returned.
    """
    factored = [(n, m) for n, m in model.named_modules() if isinstance(m, FactoredLinear)]
    # All products first: replacing an owner would take the factors from those that share them.
    products = {name: module.dense_weight() for name, module in factored}
    for name, module in factored:
        linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(products.pop(name).to(module.up.weight.dtype))
        linear.bias = module.up.bias
        model.set_submodule(name, linear)
    for attribute in ("quantization_config", "auto_map"):
        if hasattr(model.config, attribute):
            delattr(model.config, attribute)
    if hasattr(model, "hf_quantizer"):
        del model.hf_quantizer
    model.is_quantized = False
    return model


def dense_bytes(checkpoint: Path) -> int:
    """Bytes that the dense weights of a checkpoint will take, from the totals of its report.

    A folder without them is taken to be as large as it is.
    """
    stored_bytes = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    try:
        totals = read_report(checkpoint)["totals"]
        return stored_bytes * totals["total_before"] // totals["total_after"]
    except (KeyError, TypeError):
        return stored_bytes


def export_dense(checkpoint: Path, folder: Path) -> None:
    """Write a compressed checkpoint as an ordinary dense model of the same architecture.

    The products are formed in float64 from the stored factors and rounded to the stored type.

    Raises:
        InputError: `checkpoint` is not a whole checkpoint.
    """
    model = load_checkpoint(checkpoint)
    dtype: torch.dtype = model.dtype
    densify_(model)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    save_checkpoint(model, tokenizer, {}, folder, dtype)
