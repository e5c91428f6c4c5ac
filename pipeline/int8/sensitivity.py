"""What rounding each convolution alone does to a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn

from pipeline.int8.convert import (
    WeightRounding,
    as_rounded,
    folded_kernels,
    int8_entries,
    int8_tensors,
)
from pipeline.int8.grids import ActivationGrid
from pipeline.int8.runtimes import Int8Runtime
from pipeline.int8.structure import ConvStructure
from pipeline.progress import track


def conv_sensitivities(
    model: nn.Module,
    structure: ConvStructure,
    grids: Mapping[int, ActivationGrid],
    runtime: Int8Runtime,
    rounding: WeightRounding,
    measure: Callable[[], float],
) -> dict[str, float]:
    """How much the network's loss rises when one convolution is rounded, kernel and input.

    Args:
        model: never rounded; as it was when this returns.
        structure: of it.
        grids: of its tensors.
        runtime: what the grids are for.
        rounding: of kernels.
        measure: the loss of the model as it is when this is called.

    Returns:
        Name of the convolution -> loss with it rounded, less the loss of the network as it is.
    """
    # What arises elsewhere is rounded for the sake of those that read it: not here.
    alone = replace(runtime, outputs=False)
    before = measure()
    found = {}
    for name in track(list(structure.convs), "convolutions"):
        entries = int8_entries(structure, grids, alone, rounding, [name])
        kernels = folded_kernels(model, entries)
        with as_rounded(model, entries, int8_tensors(entries, grids, kernels, rounding)):
            found[name] = measure() - before
    return found
