"""Adapters of low rank on the factors of a compressed model, and merged into them again."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.checkpoint.modeling_skipcat import FactoredLinear
from pipeline.errors import MissingPackageError, PipelineError

if TYPE_CHECKING:
    from peft import PeftModel


def require_peft() -> Any:
    """The module `peft`.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingPackageError("peft", "recover", "fine-tune the factors") from error
    return peft


def _factor_names(model: nn.Module) -> list[str]:
    """Dotted names of the linears that hold factors, each once: a shared one at its owner.

    A skip-form `down` of a full-rank group has no columns and nothing to train; it is left out.
    """
    return [
        f"{name}.{child_name}"
        for name, module in model.named_modules()
        if isinstance(module, FactoredLinear)
        for child_name, child in module.named_children()
        if isinstance(child, nn.Linear) and child.weight.numel()
    ]


def attach(model: PreTrainedModel, rank: int, alpha: int, seed: int) -> PeftModel:
    """Freeze a model and put an adapter beside each of its factors.

    An adapter's second matrix starts at zero, so the outputs are unchanged. The layers are wrapped
    in place: those that share a latent go through its owner and so see the wrapped `down`.

    Args:
        model: holds factored layers; changed in place.
        rank: of every adapter.
        alpha: an adapter adds alpha / rank times its product.
        seed: of the random first matrices.

    Raises:
        PipelineError: peft wrapped other layers than the factors; a defect.
    """
    peft = require_peft()
    names = _factor_names(model)
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0, bias="none"
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft asks transformers by a name that is going to change.
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, config)
    wrapped = {
        name
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    if wrapped != set(names):
        # peft shortens long lists of names to suffixes that it takes to be unambiguous.
        odd = sorted(wrapped.symmetric_difference(names))
        raise PipelineError("peft adapted other layers than the factors.", where=", ".join(odd[:4]))
    return adapted.eval()


@torch.no_grad()
def merge_(adapted: PeftModel, dtype: torch.dtype) -> PreTrainedModel:
    """Add every adapter to its factor and take the wrapping away.

    Args:
        adapted: as `attach` returned it; no longer usable afterwards.
        dtype: what the weights will be stored in. They are rounded to it, and stay in the type
            they are in, so that what is measured next is what a reader of the file will get.
    """
    model: PreTrainedModel = adapted.merge_and_unload()
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    return model
