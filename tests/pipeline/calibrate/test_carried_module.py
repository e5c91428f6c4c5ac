"""A module without its numbers computes what the module does, once it has them again."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from pipeline.calibrate.carried_module import ModuleCode, numbers_of
from pipeline.model.structure import decoder_structure
from tests.support.families import FAMILIES, tiny_model

IDS = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_numbers_gives_the_logits_of_the_model(family: str) -> None:
    """Embedding and LM head of one of the families share a matrix."""
    model = tiny_model(family)
    code = ModuleCode.of(model)
    assert code is not None
    there = pickle.loads(pickle.dumps(code))
    found = there.call(numbers_of(model), input_ids=IDS, use_cache=False).logits
    assert torch.equal(found, model(input_ids=IDS, use_cache=False).logits)


def test_there_are_no_numbers_in_it_and_the_model_keeps_its_own() -> None:
    model = tiny_model("llama", vocab_size=5000)
    before = {name: tensor.clone() for name, tensor in numbers_of(model).items()}
    code = ModuleCode.of(model)
    assert code is not None
    assert len(code.pickled) < 50_000
    assert all(tensor.is_meta for tensor in numbers_of(code.model()).values())
    assert all(torch.equal(tensor, before[n]) for n, tensor in numbers_of(model).items())


def test_a_part_is_found_by_the_name_that_it_has_in_its_model() -> None:
    model = tiny_model("qwen2")
    layer = decoder_structure(model)[1]
    code = ModuleCode.of(model, layer.name)
    assert code is not None
    for member in layer.groups[0].members:
        found, own = (m.get_submodule(member) for m in (code.model(), model))
        assert isinstance(found, nn.Linear)
        assert found.weight.shape == own.weight.shape


class Home(nn.Module):
    """A module that no other process can import."""


def test_what_workers_cannot_make_is_none() -> None:
    model, linear = tiny_model("llama"), nn.Linear(2, 2)
    model.foreign = Home()
    assert ModuleCode.of(model) is None
    assert ModuleCode.of(nn.Sequential(nn.Linear(2, 2, device="meta"))) is None
    assert ModuleCode.of(nn.Sequential(linear)) is not None
    vars(linear)["forward"] = lambda x: x
    assert ModuleCode.of(nn.Sequential(linear)) is None


def test_numbers_that_are_neither_parameters_nor_buffers_are_not_moved_by_stealth() -> None:
    linear = nn.Linear(2, 2)
    linear.table = torch.zeros(1 << 20)  # type: ignore[assignment]
    assert ModuleCode.of(nn.Sequential(linear)) is None
