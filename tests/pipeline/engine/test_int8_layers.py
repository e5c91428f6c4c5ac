"""Convolutions in 8 bits, read off what TensorRT for RTX 1.7 says of its layers."""

from __future__ import annotations

import pytest

from pipeline.engine.int8_layers import int8_layers
from pipeline.errors import InputError


def layer(name: str, kind: str, given: str, kernel: str, nodes: list[str]) -> str:
    metadata = "".join(f"[ONNX Layer: {node}]" for node in nodes)
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {tensor(given)}], Constants: [ "
        f"{tensor(kernel)}, {tensor('Float')}], Outputs: [ {tensor('Float')}], "
        f"TacticName: t, StreamId: 0, Metadata: {metadata}"
    )


def tensor(kind: str) -> str:
    shape = "Dimensions: [-1,4,64,96], Strides: [24576,1,384,4], StrideOrder: [3,0,2,1]"
    return f"{{ Name: x, {shape}, Datatype: {kind}, Format: (NHWC) Channel major format }}"


SAID = [
    "Layers:\n"
    + "\n".join(
        (
            "Name: a, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: ,",
            # What comes before a convolution is named after it, too.
            layer("kernel_1", "kgen", "Float", "Float", ["node_q", "node_conv"]),
            layer("node_conv_2", "correlation", "Int8", "Int8", ["node_conv", "node_q"]),
            layer("node_head_3", "correlation", "Float", "Float", ["node_head"]),
        )
    )
]


def test_convolutions_are_counted_and_those_in_float_are_named() -> None:
    found = int8_layers(SAID, ["node_conv"], ["node_head"])
    assert found == {"convolutions": 2, "int8": 1, "float": ["node_head"]}
    assert int8_layers(SAID, [], ["node_head"]) == {}


@pytest.mark.parametrize("name", ["node_head", "node_gone"])
def test_a_rounded_convolution_in_float_or_in_no_layer_is_an_error(name: str) -> None:
    with pytest.raises(InputError, match="every rounded convolution") as caught:
        int8_layers(SAID, ["node_conv", name], [])
    assert name in str(caught.value)
    assert "1 of 2" in str(caught.value)


def test_a_builder_that_says_nothing_is_recorded() -> None:
    found = int8_layers([], ["node_conv"], [])
    assert (found["convolutions"], found["readable"]) == (1, False)
