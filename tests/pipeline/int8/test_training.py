"""Training under rounding: what is trained is what is delivered, and it wins back what was lost."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.checkpoint.install import install_
from pipeline.checkpoint.modeling_quantized import Int8Conv
from pipeline.errors import InputError
from pipeline.int8.calibrate import activation_grids
from pipeline.int8.convert import WeightRounding, as_rounded, folded_kernels
from pipeline.int8.outputs import _output_tensors, output_error
from pipeline.int8.runtimes import _INT8_RUNTIMES
from pipeline.int8.training import (
    finish_training_,
    scale_parameters,
    stored_rounding,
    train_rounded_,
)
from tests.support.convolutions import (
    SmallNet,
    images,
    rounded_small_net,
    seen_in_small_net,
    small_net,
)


def in_training(runtime: str, bits: int) -> tuple[SmallNet, Any, Any, WeightRounding]:
    model, entries, tensors = rounded_small_net(runtime, bits)
    grids = activation_grids(seen_in_small_net()[1], _INT8_RUNTIMES[runtime], bits=bits)
    rounding = WeightRounding(bits)
    train_rounded_(model, entries, grids, folded_kernels(model, entries), rounding)
    return model, entries, tensors, rounding


@pytest.mark.parametrize("runtime", _INT8_RUNTIMES)
@pytest.mark.parametrize("bits", [4, 8])
def test_before_a_step_the_network_computes_what_was_rounded(runtime: str, bits: int) -> None:
    model, entries, tensors, _ = in_training(runtime, bits)
    x, fixed = images(1, seed=5)[0], small_net()
    with as_rounded(fixed, entries, tensors), torch.no_grad():
        for own, other in zip(model(x), fixed(x), strict=True):
            assert torch.equal(own, other)


def steps(model: nn.Module, count: int, teacher: nn.Module) -> None:
    scales = list(scale_parameters(model))
    ours = {id(parameter) for parameter in scales}
    others = [p for p in model.parameters() if id(p) not in ours]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": scales, "lr": 3e-3}]
    optimizer = torch.optim.AdamW(groups, lr=5e-4, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count)
    for x in images(count, seed=20, batch_size=4):
        with torch.no_grad():
            targets = teacher(x)
        loss = output_error(model(x), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("runtime", _INT8_RUNTIMES)
def test_what_was_trained_is_delivered_bit_for_bit(runtime: str) -> None:
    model, entries, tensors, rounding = in_training(runtime, 4)
    steps(model, 5, small_net())
    x = images(1, seed=6)[0]
    with torch.no_grad():
        trained = model(x)
    found = finish_training_(model, entries, rounding)
    assert not list(scale_parameters(model))
    assert sum(isinstance(module, Int8Conv) for module in model.modules()) == 9
    for own, other in zip(trained, model(x), strict=True):
        assert torch.equal(own, other)
    assert any(not torch.equal(found[name], tensors[name]) for name in found)
    fresh = small_net()
    install_(fresh, entries, found)
    assert all(torch.equal(a, b) for a, b in zip(trained, fresh(x), strict=True))


@pytest.mark.parametrize("runtime", _INT8_RUNTIMES)
def test_a_network_of_codes_is_taken_up_where_it_stands(runtime: str) -> None:
    model, entries, tensors = rounded_small_net(runtime)
    install_(model, entries, tensors)
    x = images(1, seed=7)[0]
    before = model(x)
    grids, kernels, scales = stored_rounding(model, entries)
    train_rounded_(model, entries, grids, kernels, WeightRounding(), scales)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(before, model(x), strict=True))
    found = finish_training_(model, entries, WeightRounding())
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in found)


def test_distillation_wins_back_a_quarter_of_what_four_bits_lose_in_sixty_steps() -> None:
    teacher = small_net()
    model, entries, tensors, rounding = in_training("cpu", 4)
    held_out = images(4, seed=99)

    def error(network: nn.Module) -> float:
        with torch.no_grad():
            return sum(float(output_error(network(x), teacher(x))) for x in held_out)

    fixed = small_net()
    install_(fixed, entries, tensors)
    before = error(fixed)
    steps(model, 60, teacher)
    finish_training_(model, entries, rounding)
    assert error(model) < 0.75 * before


def test_every_parameter_is_trained() -> None:
    model, *_ = in_training("cpu", 4)
    output_error(model(images(1)[0]), small_net()(images(1)[0])).backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_training_that_diverged_is_refused() -> None:
    model, entries, _, rounding = in_training("cpu", 8)
    model.get_parameter("stem.0.weight").data[0] = float("nan")
    with pytest.raises(InputError, match="diverged"):
        finish_training_(model, entries, rounding)


def test_an_error_is_in_parts_of_the_variance_and_none_of_itself() -> None:
    small, large = torch.randn(100), [1000 * torch.randn(50)]
    targets = {"a": small, "b": large}
    assert float(output_error(copy.deepcopy(targets), targets)) == 0.0
    flat = {"a": small.mean().expand(100), "b": large}
    assert float(output_error(flat, targets)) == pytest.approx(99 / 100, rel=1e-4)
    assert len(_output_tensors((torch.ones(1), None, torch.ones(2)))) == 2
