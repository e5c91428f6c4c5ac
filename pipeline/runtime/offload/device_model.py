"""A checkpoint's model on a device: layers as the budget says, and all else but the embedding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pipeline.model.numbers import require_finite
from pipeline.runtime.offload.device_ring import StreamDevice
from pipeline.runtime.offload.device_weights import DeviceWeights
from pipeline.runtime.offload.residency import Budget
from pipeline.runtime.offload.stored_model import StoredModel, set_matrix
from pipeline.runtime.offload.tables import look_up_in
from pipeline.runtime.offload.weight_reader import aligned_buffer
from pipeline.runtime.sessions.onnx_cpu_session import STEADY_TOKENS

_FLOAT_BYTES = 4
# Of the residual stream, and of the MLP, that are there at once in a layer.
_STREAMS, _WIDE = 6, 4


def load_on_device(
    stored: StoredModel,
    device: StreamDevice,
    vram_bytes: int,
    other_bytes: int,
    cache_numbers: int,
    rows: int,
    places: int,
) -> DeviceWeights:
    """Give a model its numbers, in the type that they were published in.

    The embedding stays in the host's memory: a call takes few of its rows.

    Args:
        stored: the model, whose matrices are set, and its files, which are closed.
        device: computes.
        vram_bytes: of its memory, for weights, buffers, cache, what a call takes and
            `other_bytes`.
        other_bytes: that are spent otherwise, as for a draft.
        cache_numbers: of keys and values.
        rows: most tokens of a call.
        places: of the cache, that a token attends to at most.

    Raises:
        InputError: the weights cannot be read, or hold what is no number.
        ResourceError: memory does not hold what the budget leaves to it.
        UsageError: the budget is too small; says what would do.
    """
    model, dtype = stored.model, stored.dtype
    embedding = model.get_input_embeddings()
    modules = dict(model.named_modules())
    there = [name for name in stored.tables if modules[name.rpartition(".")[0]] is not embedding]
    numbers = cache_numbers + sum(math.prod(stored.tables[name].shape) for name in there)
    fixed = numbers * dtype.itemsize + stored.vector_bytes + device.library_bytes
    fixed += other_bytes + call_bytes(model.config.get_text_config(), dtype, rows, places)
    budget = Budget(vram_bytes, "--vram", "head, cache, draft and what a call takes")
    shapes = [{name: matrix.shape for name, matrix in own.items()} for own in stored.layers]
    weights = DeviceWeights(model, shapes, dtype, device, budget, fixed, _Filler(stored))
    like = torch.zeros(0, dtype=dtype, device=device.place)
    move_vectors(model, like)
    for name, tensor in stored.read_tables().items():
        if name in there:
            set_matrix(model, name, tensor.to(like))
        else:
            look_up_in(embedding, tensor, like)
    weights.read_bytes = stored.reader.read_bytes
    stored.reader.close()
    return weights


def call_bytes(config: Any, dtype: torch.dtype, rows: int, places: int) -> int:
    """What a call's numbers take beside weights and cache, at most.

    Args:
        config: of the decoder.
        dtype: that is computed in.
        rows: tokens of the call.
        places: that each attends to.
    """
    # Scores, those without what is masked, their softmax in float32, and that again in the type.
    scores = rows * config.num_attention_heads * places * (3 * dtype.itemsize + _FLOAT_BYTES)
    wide = _STREAMS * config.hidden_size + _WIDE * config.intermediate_size
    logits = STEADY_TOKENS * config.vocab_size * (dtype.itemsize + _FLOAT_BYTES)
    return scores + rows * wide * _FLOAT_BYTES + logits


def move_vectors(model: nn.Module, like: torch.Tensor) -> None:
    """Put all that is no matrix on the device; parameters become of the type, buffers keep theirs.

    Args:
        model: in which what stands for a matrix has strides of 0, or is on no device.
        like: of the type, on the device.
    """
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta and 0 not in parameter.stride():
                moved = nn.Parameter(parameter.to(like), requires_grad=False)
                module._parameters[name] = moved
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(like.device)


class _Filler:
    """Reads a layer's numbers from the disk into where they are to be."""

    def __init__(self, stored: StoredModel) -> None:
        self._stored = stored
        self._buffer = aligned_buffer(max(layout.size for layout in stored.layouts))

    def __call__(self, number: int, views: Mapping[str, torch.Tensor]) -> None:
        stored = self._stored
        stored.read_layer(number, self._buffer)
        for name, tensor in stored.tensors(number, self._buffer).items():
            require_finite(name, tensor, stored.layers[number][name].file)
            views[name].copy_(tensor)
