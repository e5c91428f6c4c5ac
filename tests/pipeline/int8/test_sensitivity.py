"""One convolution rounded at a time, and the program that chooses among them."""

from __future__ import annotations

import torch

from pipeline.int8.calibrate import activation_grids
from pipeline.int8.convert import WeightRounding
from pipeline.int8.outputs import output_error
from pipeline.int8.runtimes import _INT8_RUNTIMES
from pipeline.int8.sensitivity import conv_sensitivities
from tests.support.convolutions import images, seen_in_small_net, small_net


def test_a_convolution_whose_weights_are_spread_is_the_most_sensitive_one() -> None:
    model, teacher, batches = small_net(), small_net(), images(2, seed=5)
    for network in (model, teacher):  # a channel that no scale of its tensor's others fits
        network.get_parameter("left.0.weight").data[0, 0] *= 300
    structure, seen = seen_in_small_net()
    row = _INT8_RUNTIMES["cpu"]
    grids, rounding = activation_grids(seen, row, "min-max"), WeightRounding(4, squares=False)
    calls = []

    def measure() -> float:
        calls.append(0)
        with torch.no_grad():
            return sum(float(output_error(model(x), teacher(x))) for x in batches)

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = conv_sensitivities(model, structure, grids, row, rounding, measure)
    assert list(found) == list(structure.convs)
    assert len(calls) == 1 + len(found)
    assert min(found.values()) > 0
    assert {n: t.tolist() for n, t in model.state_dict().items()} == {
        n: t.tolist() for n, t in before.items()
    }
    fine = conv_sensitivities(model, structure, grids, row, WeightRounding(8), measure)
    assert sum(fine.values()) < sum(found.values())
