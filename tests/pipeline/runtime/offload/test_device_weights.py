"""A layer's matrices lie apart in one piece, at aligned places, and come to it as they were."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from pipeline.runtime.offload.device_weights import _ALIGNMENT, DeviceWeights, _Slab
from pipeline.runtime.offload.residency import Budget
from tests.support.families import tiny_model
from tests.support.lazy_device import LazyDevice

SHAPES = {"a": (3, 5), "b": (7, 2), "c": (64, 64)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_matrices_are_aligned_and_do_not_overlap(dtype: torch.dtype) -> None:
    slab = _Slab.of(SHAPES, dtype)
    memory = torch.zeros(slab.size + 8, dtype=torch.uint8)
    views = slab.views(memory, dtype)
    assert {name: tuple(view.shape) for name, view in views.items()} == SHAPES
    for number, view in enumerate(views.values(), start=1):
        assert (view.data_ptr() - memory.data_ptr()) % _ALIGNMENT == 0
        view.fill_(number)
    for number, view in enumerate(views.values(), start=1):
        assert bool((view == number).all())
    assert not memory[slab.size :].any()


def test_every_layer_has_its_own_numbers_wherever_they_come_from() -> None:
    model = tiny_model("llama", layers=5)
    names = [
        {name: tuple(p.shape) for name, p in model.named_parameters()
         if name.startswith(f"model.layers.{layer}.") and p.dim() > 1}
        for layer in range(5)
    ]  # fmt: skip
    filled = []

    def fill(number: int, views: Mapping[str, torch.Tensor]) -> None:
        filled.append(number)
        for view in views.values():
            view.fill_(number + 1)

    size = _Slab.of(names[0], torch.float32).size
    budget = Budget(100 + 4 * size, "--vram", "")
    weights = DeviceWeights(model, names, torch.float32, LazyDevice(), budget, 100, fill)
    found = weights.traffic(0)
    assert (found.resident, found.pass_bytes, found.held_bytes) == (2, 3 * size, 100 + 4 * size)
    for _ in range(3):
        for number, own in enumerate(names):
            weights.enter(number)
            assert all(bool((model.get_parameter(n) == number + 1).all()) for n in own)
        weights.end_pass()
    assert filled == list(range(5))
