"""A twin whose convolutions are rounded as a checkpoint's are, with scales of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.checkpoint.install import install_
from pipeline.checkpoint.modeling_cache import SmallCacheConfig
from pipeline.checkpoint.modeling_quantized import Codes
from pipeline.int8.calibrate import activation_grids
from pipeline.int8.convert import (
    Entries,
    WeightRounding,
    conv_names,
    folded_kernels,
    int8_tensors,
)
from pipeline.int8.ranges import Observer
from pipeline.int8.runtimes import int8_runtime

# Kernels of a twin are small whole numbers, so that the sums of any width are exact in float32,
# and its graph gives the twin's bits.
_COARSER = 16


def rounded_entries_of(config: PreTrainedConfig) -> Entries:
    """What a config says of rounded convolutions; nothing of one that has none."""
    quantization = getattr(config, "quantization_config", None) or {}
    fields = quantization if isinstance(quantization, dict) else vars(quantization)
    modules: Any = fields.get("modules") or {}
    return dict(modules) if conv_names(modules) else {}


def round_twin_(
    model: PreTrainedModel, entries: Entries, run: Callable[[PreTrainedModel], object]
) -> None:
    """Round a twin's convolutions where the model's are, and give its config their entries.

    Args:
        model: in float32; changed in place.
        entries: of the model.
        run: calls the twin with what it will be compared on, which gives the ranges.
    """
    entries, names = copy.deepcopy(entries), conv_names(entries)
    seen = {entries[name]["reads"]: Observer(f"what {name} reads") for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(_seen_by(seen[entries[name]["reads"]]))
        for name in names
    ]
    run(model)
    for handle in handles:
        handle.remove()
    codes = _codes_of(entries)
    runtime = int8_runtime("tensorrt" if codes.signed else "cpu")
    grids = activation_grids(seen, runtime, "min-max", codes.bits)
    kernels = folded_kernels(model, entries)
    rounding = WeightRounding(entries[names[0]]["bits"], squares=False)
    scales = {name: _COARSER * rounding.scales(kernel) for name, (kernel, _) in kernels.items()}
    install_(model, entries, int8_tensors(entries, grids, kernels, rounding, scales))
    model.config.quantization_config = SmallCacheConfig(entries)


def _seen_by(observer: Observer) -> Callable[[nn.Module, Any], None]:
    return lambda module, inputs: observer.see(inputs[0])


def _codes_of(entries: Entries) -> Codes:
    """The codes of activations, which are the same everywhere."""
    named = (entry.get(part) for entry in entries.values() for part in ("input", "output"))
    return Codes.parse(next(name for name in named if name))
