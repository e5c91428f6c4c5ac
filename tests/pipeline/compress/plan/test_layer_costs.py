"""Surveys: what they predict, and how they go on after an interruption."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.calibrate import precision
from pipeline.calibrate.fisher import BackwardSweep
from pipeline.calibrate.layer_stream import LayerStream
from pipeline.compress.finished_layers import FinishedLayers
from pipeline.compress.methods import Fit
from pipeline.compress.plan import layer_costs
from pipeline.compress.plan.layer_costs import LayerCosts
from pipeline.compress.plan.plan import Members
from pipeline.compress.plan.rank_search import searched_plan, stacks_of
from pipeline.compress.plan.stack_costs import _SENSITIVITY_SHRINKAGE, CostRequest
from pipeline.compress.walk import compress_
from pipeline.errors import InputError
from pipeline.model.structure import decoder_structure
from tests.support.families import FAMILIES, tiny_model
from tests.support.tiny_survey import TOKENS, calibrated, divergence, surveyed

SETTINGS = {"seed": 0, "text": "abc"}
LAYERS = 4


@pytest.fixture(autouse=True, scope="module")
def two_rows_at_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_costs, "_TOKENS_AT_ONCE", 2 * TOKENS.shape[1])
        yield


def measured(folder: Path, **changes: Any) -> LayerCosts:
    """A survey of a model of four layers, begun or gone on with in a folder."""
    model = tiny_model("llama", layers=LAYERS)
    survey = LayerCosts(folder, SETTINGS)
    survey.measure(model, decoder_structure(model), TOKENS[:4], CostRequest(**changes))
    return survey


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> LayerCosts:
    return measured(tmp_path_factory.mktemp("survey"))


def stop_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, interrupted at its call of this number before it does anything."""
    calls = 0

    def counting(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return function(*arguments, **named)

    return counting


def interrupt(
    folder: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, call: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop_at(call, getattr(owner, name)))
        with pytest.raises(KeyboardInterrupt):
            measured(folder)


def sensitivities(survey: LayerCosts, stack: Members) -> list[torch.Tensor]:
    return [part.double() for part in survey.of(stack).sensitivities()]


def same(one: LayerCosts, other: LayerCosts) -> bool:
    """Whether two surveys have the same curves and sensitivities, bit for bit."""
    assert one.curves.keys() == other.curves.keys()
    return all(
        np.array_equal(one.curves[stack], other.curves[stack])
        and all(map(torch.equal, sensitivities(one, stack), sensitivities(other, stack)))
        for stack in one.curves
    )


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (LayerStream, "advance", 2),
        (BackwardSweep, "_loss_gradient", 2),
        (BackwardSweep, "backward", 1),
        (BackwardSweep, "backward", 3),
        (BackwardSweep, "_through", 4),
        # After the gradient of a layer has been written, and before its curves.
        (FinishedLayers, "add", 2),
        (BackwardSweep, "remove", 1),
    ],
)
def test_a_resumed_survey_is_the_same_bit_for_bit(
    owner: type,
    name: str,
    call: int,
    undisturbed: LayerCosts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupt(tmp_path, monkeypatch, owner, name, call)
    assert same(measured(tmp_path), undisturbed)


def test_a_resumed_survey_does_not_go_forward_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(tmp_path, monkeypatch, BackwardSweep, "backward", 3)
    passed = []
    backward = BackwardSweep.backward

    def watched(sweep: BackwardSweep, index: int) -> Any:
        passed.append(index)
        return backward(sweep, index)

    monkeypatch.setattr(BackwardSweep, "backward", watched)
    monkeypatch.setattr(LayerStream, "advance", None)
    measured(tmp_path)
    assert passed == [1, 0]


def test_a_finished_survey_is_read_and_leaves_nothing_of_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = measured(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["layers"]
    monkeypatch.setattr(BackwardSweep, "__init__", None)
    assert same(measured(tmp_path), first)


@pytest.mark.parametrize("index", range(LAYERS))
@pytest.mark.parametrize("call", [3, None])
def test_a_layer_of_a_survey_that_was_damaged_is_measured_again(
    index: int,
    call: int | None,
    undisturbed: LayerCosts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if call is None:
        measured(tmp_path)
    else:
        interrupt(tmp_path, monkeypatch, BackwardSweep, "backward", call)
    path = tmp_path / "layers" / f"model.layers.{index}.safetensors"
    if path.exists():
        path.write_bytes(path.read_bytes()[:-8])
    assert same(measured(tmp_path), undisturbed)


@pytest.mark.parametrize("call", [1, 2])
def test_a_survey_with_other_settings_is_refused(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Before the first layer is finished, too: a sweep has been made, of another text perhaps.
    interrupt(tmp_path, monkeypatch, BackwardSweep, "backward", call)
    with pytest.raises(InputError, match="other settings") as caught:
        LayerCosts(tmp_path, SETTINGS | {"text": "xyz"})
    assert "text" in caught.value.details["observed"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kept", [0.7, 0.9])
def test_the_expected_kl_is_what_is_measured_within_a_factor_of_two(
    family: str, kept: float
) -> None:
    tiny = surveyed(family)
    plan = searched_plan(tiny.layers, tiny.survey.curves, kept)
    model = copy.deepcopy(tiny.model)
    ready = calibrated(model, tiny.layers, tiny.survey)
    compress_(ready, plan, dtype=torch.float32, fit=Fit())
    expected = sum(group.expected_kl or 0.0 for group in plan.groups)
    assert 0.5 < expected / divergence(tiny.model, model) < 2


@pytest.mark.parametrize("cat", [True, False])
def test_there_is_a_falling_curve_for_every_stack_that_may_be_wanted(
    cat: bool, tmp_path: Path
) -> None:
    survey = measured(tmp_path, cat=cat)
    layers = decoder_structure(tiny_model("llama", layers=LAYERS))
    stacks = [stack for y in layers for g in y.groups for stack in stacks_of(g, cat=cat)]
    assert set(survey.curves) == set(stacks)
    for layer in layers:
        for group in layer.groups:
            heights = dict(zip(group.members, group.out_features, strict=True))
            for stack in stacks_of(group, cat=cat):
                curve = survey.curves[stack]
                full = min(sum(heights[m] for m in stack), group.in_features)
                assert curve.shape == (full + 1,)
                assert (np.diff(curve) <= 0).all()
                assert curve[-1] == 0


def test_a_shared_right_factor_costs_no_less_at_a_rank_than_each_its_own() -> None:
    tiny = surveyed("llama")
    group = tiny.layers[0].groups[0]
    whole = tiny.survey.curves[group.members]
    alone = [tiny.survey.curves[(member,)] for member in group.members]
    for rank in range(len(whole)):
        separate = sum(float(curve[min(rank, len(curve) - 1)]) for curve in alone)
        assert whole[rank] >= separate - 1e-9


def test_curves_are_the_tails_of_what_it_keeps() -> None:
    tiny = surveyed("llama")
    group = tiny.layers[0].groups[1]
    (member,) = group.members
    moments = LayerStream(tiny.model, tiny.layers, TOKENS).advance(0)[group.name].mean()
    weight = tiny.model.get_submodule(member).weight.double()
    (g,) = sensitivities(tiny.survey, (member,))
    whole = (
        torch.trace(g @ weight @ tiny.survey.of((member,)).geometry(moments).double() @ weight.T)
        / 2
    )
    # What is kept has been rounded to bfloat16.
    assert tiny.survey.curves[(member,)][0] == pytest.approx(whole.item(), rel=1e-2)
    shrunk_least = _SENSITIVITY_SHRINKAGE * g.diagonal().mean() * (1 - 2**-7)
    assert torch.linalg.eigvalsh(g)[0] > shrunk_least * 0.9


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_output_tails_are_those_of_the_singular_values_of_the_outputs(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_has_bfloat16_units", lambda: False)
    tiny = surveyed(family)
    tails, _ = calibrated(tiny.model, tiny.layers).output_tails()
    stream = LayerStream(tiny.model, tiny.layers, TOKENS)
    for index, layer in enumerate(tiny.layers):
        moments = stream.advance(index)
        for group in layer.groups:
            root = np.linalg.cholesky(moments[group.name].mean().numpy())
            for member in group.members:
                weight = tiny.model.get_submodule(member).weight.detach().double().numpy()
                s = np.linalg.svd(weight @ root, compute_uv=False)
                expected = [(s[rank:] ** 2).sum() for rank in range(len(s) + 1)]
                # The ridge is 1e-9 of the trace of S for every number of the row of a weight.
                np.testing.assert_allclose(tails[member], expected, rtol=1e-5, atol=1e-6)
