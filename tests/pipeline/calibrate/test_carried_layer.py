"""What a layer takes of memory where it is run for others, against what is declared."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from pipeline.calibrate.carried_layer import (
    LayerCode,
    is_carried,
    layer_bytes,
    layer_gradients,
    layer_output,
)
from pipeline.calibrate.carried_module import numbers_of
from pipeline.calibrate.layer_stream import LayerStream
from pipeline.memory import forget_peak, peak_bytes, return_free_memory
from pipeline.model.structure import decoder_structure
from tests.support.families import tiny_model

WIDTH, SHAPE = 512, (4, 256, 512)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is reset by Linux alone")
@pytest.mark.parametrize("back", [False, True])
def test_no_more_memory_is_taken_than_is_declared(back: bool) -> None:
    model = tiny_model("llama", layers=1, hidden_size=WIDTH, intermediate_size=4 * WIDTH)
    (layer,) = decoder_structure(model)
    stream = LayerStream(model, [layer], torch.zeros(SHAPE[:2], dtype=torch.int64), SHAPE[0])
    code = LayerCode.of(model, layer.name)
    assert code is not None
    numbers = numbers_of(model.get_submodule(layer.name))
    given = (code, layer.groups, numbers, stream.keywords[SHAPE[0]][0], torch.randn(SHAPE))
    gradient = torch.randn(SHAPE)
    code.module.model()
    return_free_memory()
    forget_peak()
    before = peak_bytes()
    if back:
        layer_gradients(*given, gradient)
    else:
        layer_output(*given)
    declared = layer_bytes(layer.groups, SHAPE, code.heads, back=back)
    assert peak_bytes() - before < declared


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, True),
        ({"mask": torch.ones(2), "both": (torch.ones(2), [1, 2.0, "a"])}, True),
        (object(), False),
        ({"cache": [object()]}, False),
    ],
)
def test_only_numbers_and_texts_are_carried(value: Any, expected: bool) -> None:
    assert is_carried(value) is expected
