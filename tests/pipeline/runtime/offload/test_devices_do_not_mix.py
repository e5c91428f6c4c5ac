"""What a call computes with is all on the device: tensors without numbers, but with devices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.model.structure import layer_list
from pipeline.runtime.offload.device_weights import DeviceWeights
from pipeline.runtime.offload.residency import Budget
from pipeline.runtime.offload.side_by_side import ModelCall
from pipeline.runtime.offload.steady_attention import STEADY_ATTENTION, CallCache, Part
from pipeline.runtime.offload.stored_model import set_matrix
from pipeline.runtime.offload.streamed_model import StreamedModel
from tests.support.families import FAMILIES, tiny_model

LAYERS, ROWS, PLACES, SLOTS = 4, 17, 64, 3
GPU = torch.device("cuda:0")
pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch is for CPUs alone")


class Elsewhere:
    """A `StreamDevice` whose memory is that of no GPU, and which does nothing."""

    place, library_bytes, waited_s, peak_bytes = GPU, 0, 0.0, 0

    def pinned(self, size_bytes: int) -> torch.Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8)

    def buffer(self, size_bytes: int) -> torch.Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8, device=GPU)

    def copy(self, buffer: torch.Tensor, source: torch.Tensor) -> None:
        assert buffer.device == GPU
        assert source.device.type == "cpu"

    def mark_copies(self) -> None: ...

    def mark_compute(self) -> None: ...

    def hold_copies(self, event: None) -> None: ...

    def hold_compute(self, event: None) -> None: ...

    def finish(self) -> None: ...


@pytest.fixture
def without_numbers() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def elsewhere(family: str, dtype: torch.dtype) -> StreamedModel:
    """A model on the device, to which all of its layers but one are copied."""
    model = tiny_model(family, layers=LAYERS)
    model.set_attn_implementation(STEADY_ATTENTION)
    path, layers = layer_list(model)
    shapes = []
    for number, layer in enumerate(layers):
        named = {name: p.shape for name, p in layer.named_parameters() if p.dim() > 1}
        shapes.append({f"{path}.{number}.{name}": tuple(s) for name, s in named.items()})
        for name, shape in shapes[-1].items():
            set_matrix(model, name, torch.empty(shape, device="meta"))
    # An embedding looks rows up by numbers; here there are none, so it has its whole table.
    embedding: Any = model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda module, given: (given[0].to(GPU), *given[1:]))
    # One layer stays, or none, by what their places are rounded up to.
    layer_bytes = dtype.itemsize * sum(math.prod(shape) for shape in shapes[0].values())
    budget = Budget(LAYERS * layer_bytes - 1, "--vram", "")
    weights = DeviceWeights(model, shapes, dtype, Elsewhere(), budget, 0, _leave)
    return StreamedModel(model, weights)


def _leave(number: int, views: Any) -> None:
    """Leave a layer without numbers."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_calls_of_every_family(family: str, dtype: torch.dtype, without_numbers: None) -> None:
    streamed = elsewhere(family, dtype)
    config = streamed.model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = torch.zeros(SLOTS, config.num_key_value_heads, PLACES, width, dtype=dtype, device=GPU)
    held = [(keys, keys.clone())] * LAYERS
    ids = np.arange(ROWS)
    together = [Part(0, 0, ids[:9]), Part(2, 40, ids[:3])]
    calls = [
        ModelCall(CallCache(held, together, ROWS)),
        ModelCall(CallCache(held, [Part(1, 5, ids)], ROWS), torch.full((1,), 3, device=GPU)),
    ]
    for given in (calls[:1], calls[1:], calls):
        for logits in streamed.run(given):
            assert (logits.device, logits.dtype) == (GPU, dtype)
    assert streamed.traffic.resident < LAYERS - 1
