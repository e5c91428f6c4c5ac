"""Layers that are run by workers give the bytes that this process gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.calibrate.fisher import BackwardSweep
from pipeline.calibrate.measured_stream import MeasuredStream
from pipeline.calibrate.moments import SeenGroup
from pipeline.calibrate.paired_stream import PairedStream
from pipeline.checkpoint.install import install_
from pipeline.compress.factorize.whitened_svd import InputMoments
from pipeline.compress.fit_group import fit_group
from pipeline.compress.methods import ONE_SIDED
from pipeline.compress.plan.plan import GroupPlan
from pipeline.compress.walk import plan_entries
from pipeline.errors import InputError
from pipeline.model.structure import Group, decoder_structure
from pipeline.workers.workers import IN_PROCESS, Workers
from tests.support.elsewhere import Elsewhere
from tests.support.families import FAMILIES, tiny_model

TOKENS = torch.randint(3, 60, (5, 12), generator=torch.Generator().manual_seed(1))


def swept(
    model: PreTrainedModel, folder: Path, workers: Workers
) -> tuple[dict[str, SeenGroup], list[torch.Tensor]]:
    """What was seen of all groups, and the gradient by the input of the first layer."""
    layers = decoder_structure(model)
    sweep = BackwardSweep(model, layers, TOKENS, folder, batch_size=2, workers=workers)
    sweep.forward()
    seen: dict[str, SeenGroup] = {}
    for index in reversed(range(len(layers))):
        seen |= dict(sweep.seen(index))
    return seen, sweep._kept(0)[0]


def same(found: SeenGroup, expected: SeenGroup) -> bool:
    pairs = [
        (found.inputs, expected.inputs),
        (found.weighted, expected.weighted),
        *zip(found.outputs, expected.outputs, strict=True),
    ]
    return all(torch.equal(a.get(), b.get()) and a.get().dtype == b.get().dtype for a, b in pairs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sweep_by_workers_sees_the_bytes_that_one_process_sees(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, workers = tiny_model(family).to(dtype), Elsewhere()
    own, own_inputs = swept(model, tmp_path / "own", IN_PROCESS)
    found, inputs = swept(model, tmp_path / "others", workers)
    assert found.keys() == own.keys()
    assert all(same(found[name], own[name]) for name in own)
    assert all(map(torch.equal, inputs, own_inputs))
    first = decoder_structure(model)[0].name
    assert workers.asked.count(f"{first}, forward") == workers.asked.count(f"{first}, back") == 3


def test_what_is_wide_is_summed_block_by_block_to_the_same_bytes(tmp_path: Path) -> None:
    model = tiny_model("llama", hidden_size=160, intermediate_size=400)
    own, _ = swept(model, tmp_path / "own", IN_PROCESS)
    found, _ = swept(model, tmp_path / "others", Elsewhere())
    assert all(same(found[name], own[name]) for name in own)


def test_layers_that_were_changed_are_run_by_this_process_and_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, workers = tiny_model("llama"), Elsewhere()
    name = decoder_structure(model)[0].groups[0].members[0]
    linear = model.get_submodule(name)
    monkeypatch.setattr(linear, "forward", lambda x: nn.Linear.forward(linear, x))
    swept(model, tmp_path, workers)
    assert not any("forward" in where for where in workers.asked)
    assert "this process alone carries the text" in capsys.readouterr().err


def test_values_that_are_no_numbers_name_the_linear(tmp_path: Path) -> None:
    model = tiny_model("llama")
    linear = decoder_structure(model)[1].groups[0].members[0]
    layers = decoder_structure(model)
    sweep = BackwardSweep(model, layers, TOKENS, tmp_path, batch_size=2, workers=Elsewhere())
    sweep.forward()
    nn.init.constant_(model.get_submodule(linear).weight, torch.nan)
    with pytest.raises(InputError, match="finite") as caught:
        dict(sweep.seen(1))
    assert caught.value.details["where"].startswith(linear.rsplit(".", 2)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_both_models_side_by_side_give_the_same_bytes_by_workers(family: str) -> None:
    ways = [paired(family, IN_PROCESS), paired(family, Elsewhere())]
    assert len(ways[0]) == len(ways[1]) > 0
    assert all(map(torch.equal, *ways))


def paired(family: str, workers: Workers) -> list[torch.Tensor]:
    """Moments of every group while the groups become products, and the hidden states at the end."""
    model = tiny_model(family)
    layers, found = decoder_structure(model), list[torch.Tensor]()
    stream = PairedStream(model, layers, TOKENS, 2, workers)
    for index, layer in enumerate(layers):
        stream.enter(index)
        for group in layer.groups:
            seen, drift = stream.measure(index, group.name)
            found += [seen, drift]
            replace_(model, group)
        stream.leave(index)
    return [*found, *stream.original.hidden, *stream.compressed]


def replace_(model: PreTrainedModel, group: Group) -> None:
    """Put block-skip factors that share a latent in the place of a group, B' in four bits."""
    plan = GroupPlan(
        group.members, sum(group.out_features), group.in_features, "skip", 5, None, None,
        None, "int4-b16-asym",
    )  # fmt: skip
    weights = [model.get_submodule(member).weight.detach() for member in group.members]
    inputs = InputMoments(torch.eye(group.in_features).double())
    fitted = fit_group(plan, weights, inputs, None, ONE_SIDED, torch.float32)
    install_(model, plan_entries((plan,)), fitted.tensors)


def test_one_model_alone_gives_the_same_bytes_by_workers() -> None:
    model = tiny_model("llama")
    layers = decoder_structure(model)
    ways = [MeasuredStream(model, layers, TOKENS, way, 2) for way in (IN_PROCESS, Elsewhere())]
    for index, layer in enumerate(layers):
        own, found = (way.advance(index) for way in ways)
        assert own.keys() == found.keys() == {group.name for group in layer.groups}
        assert all(torch.equal(own[name].get(), found[name].get()) for name in own)
