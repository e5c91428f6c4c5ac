"""Which convolutions an engine computes in integers, by what the builder says of its layers.

TensorRT for RTX lists the layers of a finished engine among its most talkative messages, with the
type of every input, constant and output. It does so where it builds, and needs no GPU for it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pipeline.errors import InputError

LAYERS = "Layers:"
_SHOWN = 5
_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_TYPE = re.compile(r"Datatype: (\w+)")
_PARTS = re.compile(r"LayerType: (\w+), Inputs: \[(.*?)\], Constants: \[(.*?)\], Outputs: \[")
# Kernels that TensorRT generates for what lies between the convolutions, and names after them, too.
_BETWEEN = ("kgen", "shape_call")
_INT8 = "Int8"


def int8_layers(
    said: Sequence[str], rounded: Sequence[str], other: Sequence[str]
) -> dict[str, Any]:
    """What the manifest says of convolutions in 8 bits.

    Args:
        said: the builder's messages on layers.
        rounded: nodes of the graph that read codes, and multiply them with codes.
        other: all other convolutions.

    Returns:
        `convolutions`, how many there are; `int8`, how many multiply Int8 with Int8; `float`, the
        names of the others. Where the builder says nothing, `readable` is False in their place.

    Raises:
        InputError: a convolution that was rounded is not computed in Int8.
    """
    if not rounded:
        return {}
    found = _computed_in(said)
    if not found:
        return {
            "convolutions": len(rounded) + len(other), "readable": False,
            "why": "this TensorRT says nothing of its layers as it builds",
        }  # fmt: skip
    wrong = [name for name in rounded if found.get(name) is not True]
    if wrong:
        raise InputError(
            "TensorRT does not compute every rounded convolution in 8 bits.",
            where=", ".join(wrong[:_SHOWN]) + ", ..." * (len(wrong) > _SHOWN),
            observed=f"{len(wrong)} of {len(rounded)} in float, or in no layer of their own",
            expected="Int8 inputs and Int8 kernels",
            change="use the TensorRT that this was tested with (docs/driving.md)",
        )
    return {
        "convolutions": len(rounded) + len(other), "int8": len(rounded), "float": list(other),
    }  # fmt: skip


def _computed_in(said: Sequence[str]) -> dict[str, bool]:
    """Node of the graph -> whether the layer that it became multiplies Int8 with Int8."""
    found = {}
    for line in (line for message in said for line in message.splitlines()):
        parts = _PARTS.search(line)
        if parts is None or parts[1] in _BETWEEN:
            continue
        inputs, constants = (_TYPE.findall(parts[place]) for place in (2, 3))
        is_int8 = inputs[:1] == [_INT8] and constants[:1] == [_INT8]
        # The first node is the one that the layer is for; scales and rounding follow.
        for node in _ONNX_NODE.findall(line)[:1]:
            found[node] = is_int8
    return found
