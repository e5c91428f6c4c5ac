"""What is learned starts from its codes, stays on a grid, and lowers what it is told to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.quantize.formats import Format
from pipeline.quantize.gptq import gptq
from pipeline.quantize.groupwise import Blocks, quantize_blocks
from pipeline.quantize.learned_rounding import LearnedBlocks, descent, scaled

FORMATS = ["int3-b16-asym", "int4-b32-offset", "int4-row-sym", "int2-b16-asym"]
GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(24, 40, generator=GENERATOR)
INPUTS = torch.randn(512, 40, generator=GENERATOR) @ torch.randn(40, 40, generator=GENERATOR)


def nearest(name: str) -> Blocks:
    format = Format.parse(name)
    return quantize_blocks(WEIGHT.numpy(), format.bits, format.width(40), zero=format.zero)


def learn_(matrix: LearnedBlocks, parameter: nn.Parameter, travel: float = 0.1) -> None:
    """Lower the squared error of the outputs in a hundred steps."""
    parameter.requires_grad_(True)
    optimizer, before = descent([parameter]), error(matrix.start)
    for step in range(100):
        optimizer.zero_grad()
        loss = (INPUTS @ (matrix.values() - WEIGHT).T).square().mean()
        scaled(loss, before, [parameter]).backward()
        optimizer.param_groups[0]["lr"] = travel / 50 * (1 - step / 100)
        optimizer.step()
    parameter.requires_grad_(False)


def error(blocks: Blocks) -> float:
    return float((INPUTS @ (blocks.values().float() - WEIGHT).T).square().mean())


@pytest.mark.parametrize("name", FORMATS)
def test_what_has_learned_nothing_is_what_it_started_from(name: str) -> None:
    start = nearest(name)
    matrix = LearnedBlocks(start)
    assert torch.equal(matrix.values().double(), start.values())
    for tensor, other in zip(
        matrix.blocks().stored_tensors().values(), start.stored_tensors().values(), strict=True
    ):
        assert torch.equal(tensor, other)


@pytest.mark.parametrize("name", FORMATS)
def test_outputs_come_nearer_to_what_they_should_be_by_scales_alone(name: str) -> None:
    matrix = LearnedBlocks(nearest(name))
    learn_(matrix, matrix.stretches)
    learned = matrix.blocks()
    assert error(learned) < 0.99 * error(matrix.start)
    assert (learned.codes == matrix.start.codes).all()


def test_scales_of_codes_that_were_fed_forward_are_no_end() -> None:
    moment = (INPUTS.T @ INPUTS / len(INPUTS)).double()
    start = gptq(WEIGHT, Format.parse("int4-b16-offset"), moment)
    assert error(start) < error(nearest("int4-b16-offset"))
    matrix = LearnedBlocks(start)
    learn_(matrix, matrix.stretches)
    assert error(matrix.blocks()) < error(start)


def test_weights_that_were_nearly_rounded_the_other_way_turn_first() -> None:
    rests = np.zeros((1, 1, 4), np.float32)
    rests[0, 0, 1] = 0.48
    start = Blocks(np.full((1, 1, 4), 3, np.uint8), np.ones((1, 1), np.float32), None, 3, 4, rests)
    matrix = LearnedBlocks(start)
    assert (matrix.blocks().codes == 3).all()
    with torch.no_grad():
        matrix.moves.add_(0.1)
    assert matrix.blocks().codes.flatten().tolist() == [3, 4, 3, 3]


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_stored_stands_for_what_was_learned(name: str) -> None:
    matrix = LearnedBlocks(nearest(name))
    learn_(matrix, matrix.stretches)
    learn_(matrix, matrix.moves)
    format = Format.parse(name)
    stored = matrix.blocks()
    assert stored.codes.max() < 2**format.bits
    again = Blocks.from_stored(stored.stored_tensors(), format, 40)
    found, wanted = again.values().float(), matrix.values().detach()
    # Scales and offsets are rounded to float16: a relative 2^-11 of the largest numbers.
    assert float((found - wanted).abs().max()) < 2e-3 * float(WEIGHT.abs().max())
