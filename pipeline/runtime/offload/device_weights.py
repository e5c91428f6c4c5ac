"""Layers in page-locked memory, of which some stay on a device, and others are copied for a call.

A layer's matrices lie in one piece, each at an aligned place, in the type that they are computed
in: so a layer is one copy, and its matrices are views of whichever buffer that went into.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.memory import require_free_memory
from pipeline.model.numbers import require_finite
from pipeline.progress import track
from pipeline.runtime.offload.device_ring import DeviceRing, StreamDevice
from pipeline.runtime.offload.residency import Budget
from pipeline.runtime.offload.stored_model import StoredModel, set_matrix
from pipeline.runtime.offload.tables import look_up_in
from pipeline.runtime.offload.traffic import Traffic
from pipeline.runtime.offload.weight_reader import aligned_buffer
from pipeline.runtime.sessions.onnx_cpu_session import STEADY_TOKENS

# To which a matrix's place in its slab is aligned: what a GPU's products read at once, and more.
_ALIGNMENT = 512
_FLOAT_BYTES = 4
# Of the residual stream, and of the MLP, that are there at once in a layer.
_STREAMS, _WIDE = 6, 4

Shapes = Mapping[str, tuple[int, ...]]
# A layer's number and its matrices -> their numbers are there.
_Fill = Callable[[int, Mapping[str, torch.Tensor]], None]


@dataclass(frozen=True)
class _Slab:
    """Where a layer's matrices lie.

    Attributes:
        shapes: of each.
        places: first byte of each.
        size: bytes in all.
    """

    shapes: Shapes
    places: Mapping[str, int]
    size: int

    @classmethod
    def of(cls, shapes: Shapes, dtype: torch.dtype) -> _Slab:
        places, size = {}, 0
        for name, shape in shapes.items():
            places[name] = size
            size += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        return cls(shapes, places, size)

    def views(self, memory: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Each matrix, where it lies in uint8 [size] or more."""
        return {
            name: memory[place : place + math.prod(self.shapes[name]) * dtype.itemsize]
            .view(dtype)
            .view(self.shapes[name])
            for name, place in self.places.items()
        }


class DeviceWeights:
    """The numbers of a model's layers: some stay on a device, the others come by copies.

    All that is no matrix is put on the device, too.

    Args:
        model: whose matrices are set; what stands for one has strides of 0, or is on no device.
        layers: names and shapes of the matrices of each layer.
        dtype: of them all.
        device: computes.
        budget: of its memory.
        fixed_bytes: of it that are spent otherwise.
        fill: called once for each layer, with views of the host's memory.

    Attributes:
        read_bytes: that `fill` has read from disk; for whoever fills to say.

    Raises:
        ResourceError: the host's memory does not hold the layers that are copied, or the device's
            does not hold what the budget promises.
        UsageError: the budget is too small; says what would do.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[Shapes],
        dtype: torch.dtype,
        device: StreamDevice,
        budget: Budget,
        fixed_bytes: int,
        fill: _Fill,
    ) -> None:
        self._model, self._dtype, self._device = model, dtype, device
        self._slabs = [_Slab.of(shapes, dtype) for shapes in layers]
        self._plan = budget.plan([slab.size for slab in self._slabs], fixed_bytes)
        self._streamed = [n for n in range(len(layers)) if n not in self._plan.resident]
        self._pass_bytes = sum(self._slabs[n].size for n in self._streamed)
        self.read_bytes = 0
        require_free_memory(
            self._pass_bytes,
            "Memory does not hold the layers that are copied to the GPU.",
            where="--vram",
            of="page-locked, ",
            change="give more bytes by --vram, so that more layers stay on the GPU, or run it "
            "without --device, under --memory, which reads layers from disk",
        )
        pinned = self._fill_all(fill)
        self._ring = DeviceRing(device, pinned) if pinned else None
        _move_vectors(model, torch.zeros(0, dtype=dtype, device=device.place))

    @classmethod
    def of(
        cls,
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
        there = {n for n in stored.tables if modules[n.rpartition(".")[0]] is not embedding}
        numbers = cache_numbers + sum(math.prod(stored.tables[name].shape) for name in there)
        fixed = numbers * dtype.itemsize + stored.vector_bytes + device.library_bytes
        fixed += other_bytes + cls.call_bytes(model.config.get_text_config(), dtype, rows, places)
        budget = Budget(vram_bytes, "--vram", "head, cache, draft and what a call takes")
        shapes = [{name: matrix.shape for name, matrix in own.items()} for own in stored.layers]
        weights = cls(model, shapes, dtype, device, budget, fixed, _Filler(stored))
        like = torch.zeros(0, dtype=dtype, device=device.place)
        for name, tensor in stored.read_tables().items():
            if name in there:
                set_matrix(model, name, tensor.to(like))
            else:
                look_up_in(embedding, tensor, like)
        weights.read_bytes = stored.reader.read_bytes
        stored.reader.close()
        return weights

    @staticmethod
    def call_bytes(config: Any, dtype: torch.dtype, rows: int, places: int) -> int:
        """What a call's numbers take beside weights and cache, at most.

        Args:
            config: of the decoder.
            dtype: that is computed in.
            rows: tokens of the call.
            places: that each attends to.
        """
        # Scores, those without what is masked, their softmax in float32, that again in the type.
        scores = rows * config.num_attention_heads * places * (3 * dtype.itemsize + _FLOAT_BYTES)
        wide = _STREAMS * config.hidden_size + _WIDE * config.intermediate_size
        logits = STEADY_TOKENS * config.vocab_size * (dtype.itemsize + _FLOAT_BYTES)
        return scores + rows * wide * _FLOAT_BYTES + logits

    def _fill_all(self, fill: _Fill) -> list[torch.Tensor]:
        """Give every layer its memory and its numbers: the slabs of those that are copied."""
        pinned: list[torch.Tensor] = []
        for number in track(range(len(self._slabs)), "layers"):
            slab = self._slabs[number]
            if number in self._plan.resident:
                memory = torch.empty(slab.size, dtype=torch.uint8)
            else:
                memory = self._device.pinned(slab.size)
                pinned.append(memory)
            fill(number, slab.views(memory, self._dtype))
            if number in self._plan.resident:
                kept = self._device.buffer(slab.size)
                kept.copy_(memory)
                self._set(number, kept)
        return pinned

    def traffic(self, passes: int) -> Traffic:
        """What was copied so far in so many calls, and what is held."""
        return Traffic(
            layers=len(self._slabs),
            resident=len(self._plan.resident),
            pass_bytes=self._pass_bytes,
            read_bytes=self.read_bytes,
            passes=passes,
            waited_s=self._device.waited_s,
            direct=True,
            held_bytes=self._plan.held_bytes,
            copied_bytes=0 if self._ring is None else self._ring.copied_bytes,
            pinned_bytes=self._pass_bytes,
            device_peak_bytes=self._device.peak_bytes,
        )

    def enter(self, number: int) -> None:
        """Let a layer's matrices be where its numbers are, or will be when they are read."""
        self.end_pass()
        if number not in self._plan.resident:
            assert self._ring is not None
            self._set(number, self._ring.take())

    def end_pass(self) -> None:
        """Let the buffer of the layer that was entered last be filled again."""
        if self._ring is not None:
            self._ring.release()

    def restart(self) -> None:
        """Let the next layer be the first again, whatever went wrong."""
        if self._ring is not None:
            self._ring.restart()

    def close(self) -> None:
        """Wait for what is on its way."""
        self._device.finish()

    def _set(self, number: int, memory: torch.Tensor) -> None:
        for name, view in self._slabs[number].views(memory, self._dtype).items():
            set_matrix(self._model, name, view)


def _move_vectors(model: nn.Module, like: torch.Tensor) -> None:
    """Put all that is no matrix on the device; parameters become of the type, buffers keep theirs.

    Args:
        model: as of `DeviceWeights`.
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
