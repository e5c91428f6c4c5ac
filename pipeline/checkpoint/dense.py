"""Back to ordinary matrices: no smaller, but loadable by every other tool."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from pipeline.artefact import write_json
from pipeline.checkpoint.folder import (
    load_checkpoint,
    read_record,
    require_checkpoint,
    save_checkpoint,
)
from pipeline.checkpoint.modeling_cache import cache_maps, hook_cache_maps
from pipeline.checkpoint.modeling_quantized import QuantizedEmbedding, QuantizedLinear
from pipeline.checkpoint.modeling_skipcat import FactoredLinear
from pipeline.errors import InputError
from pipeline.model.loading import explaining
from pipeline.model.task import TASKS, task_of_folder
from pipeline.model.weight_files import weight_files
from pipeline.provenance import provenance


def densify_(model: PreTrainedModel) -> PreTrainedModel:
    """Replace every factored layer by the product of its factors, and codes by numbers.

    Args:
        model: changed in place, and returned.
    """
    # All products first: replacing an owner would take the factors from those that share them.
    products = {
        name: (module.dense_weight().to(module.up.weight.dtype), module.up.bias)
        for name, module in model.named_modules()
        if isinstance(module, FactoredLinear)
    }
    inside = tuple(f"{name}." for name in products)
    embeddings: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedEmbedding):
            weight = embeddings.setdefault(id(module.stored), _frozen(module.weight))
            model.set_submodule(name, nn.Embedding.from_pretrained(weight))
        elif isinstance(module, QuantizedLinear) and not name.startswith(inside):
            weight = embeddings.setdefault(id(module.matrix), _frozen(module.weight))
            model.set_submodule(name, _linear(weight, module.bias))
            if module.table_reference:
                model.config.tie_word_embeddings = True
    for name, (product, bias) in products.items():
        model.set_submodule(name, _linear(_frozen(product), bias))
    hook_cache_maps(model)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if hasattr(model, "hf_quantizer"):
        del model.hf_quantizer
    model.is_quantized = False
    return model


def _refuse_cache_maps(model: PreTrainedModel, checkpoint: Path) -> None:
    """Raise InputError for a checkpoint whose cache is smaller: no ordinary model has its maps."""
    maps = cache_maps(model)
    if maps:
        raise InputError(
            "The maps of a smaller cache have no place in an ordinary model.",
            where=checkpoint,
            observed=f"{len(maps)} maps, of {next(iter(maps.values())).source} and others",
            change="compress without a budget for the cache",
        )


def _frozen(weight: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach(), requires_grad=False)


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    if bias is not None:
        linear.bias = bias
    return linear


def dense_bytes(checkpoint: Path) -> int:
    """Bytes that the dense weights of a checkpoint will take, from the totals of its report.

    A folder without them is taken to be as large as it is.

    Raises:
        InputError: it is no checkpoint.
    """
    require_checkpoint(checkpoint)
    stored_bytes = sum(path.stat().st_size for path in weight_files(checkpoint))
    try:
        totals = read_record(checkpoint, "report.json")["totals"]
        return stored_bytes * totals["total_before"] // totals["total_after"]
    except (KeyError, TypeError):
        return stored_bytes


def export_dense(checkpoint: Path, folder: Path, *, trust_remote_code: bool = False) -> None:
    """Write a compressed checkpoint as an ordinary dense model of the same architecture.

    The products are formed in float64 from the stored factors and rounded to the stored type.

    Raises:
        InputError: `checkpoint` is not a whole checkpoint, or its cache is smaller.
    """
    checkpoint = Path(checkpoint)
    model = load_checkpoint(checkpoint, trust_remote_code=trust_remote_code)
    dtype: torch.dtype = model.dtype
    _refuse_cache_maps(model, Path(checkpoint))
    densify_(model)
    processor_class = TASKS[task_of_folder(checkpoint)].processor_class
    with explaining("The checkpoint's tokenizer or processor could not be loaded.", checkpoint):
        processor = getattr(transformers, processor_class).from_pretrained(
            checkpoint, trust_remote_code=trust_remote_code
        )
    save_checkpoint(model, processor, {}, folder, dtype, source=checkpoint)
    # Nothing else in the folder says that it is ours to replace.
    made_of = {"checkpoint": checkpoint.resolve().name}
    write_json(folder / "dense.json", {"schema": 1, **made_of, "provenance": provenance()})
