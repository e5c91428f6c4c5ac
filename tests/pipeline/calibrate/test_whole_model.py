"""Moments and sensitivities of a classifier against what they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.calibrate import whole_model
from pipeline.calibrate.whole_model import measure_whole
from pipeline.compress.plan import stack_costs
from pipeline.compress.plan.layer_costs import WholeModelCosts
from pipeline.compress.plan.stack_costs import CostRequest
from pipeline.errors import InputError
from pipeline.model.classifier_structure import ImageStructure
from tests.support.classifiers import tiny_classifier

SHAPE = (3, 16, 16)
LINEAR = "vit.layers.1.mlp.fc1"


def measured(family: str, pixels: torch.Tensor, **keywords: Any) -> WholeModelCosts:
    model = tiny_classifier(family)
    layers = ImageStructure.of(model, SHAPE).layers
    moments = measure_whole(model, layers, pixels, gradients=True, **keywords)
    costs = WholeModelCosts(model, layers, moments, whole_model.DRAWS * len(pixels))
    costs.measure(CostRequest())
    return costs


def watched(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What LINEAR is given and returns, and the logits; by hooks of its own."""
    model = tiny_classifier("vit")
    caught: list[torch.Tensor] = []
    hook = model.get_submodule(LINEAR).register_forward_hook(
        lambda module, args, output: caught.extend((args[0], output))
    )
    logits = model(pixel_values=pixels).logits
    hook.remove()
    return caught[0], caught[1], logits


def test_the_moment_is_the_mean_over_images_and_patches() -> None:
    pixels = torch.randn(10, *SHAPE)
    x = watched(pixels)[0].detach().double().reshape(-1, 32)
    survey = measured("vit", pixels, batch_size=4)
    torch.testing.assert_close(survey.moment((LINEAR,)), x.T @ x / len(x), rtol=1e-5, atol=1e-6)


def test_sensitivities_approach_the_fisher_information(monkeypatch: pytest.MonkeyPatch) -> None:
    # By the definition: every class, weighted by its probability, image by image.
    pixels = torch.randn(6, *SHAPE)
    _, y, logits = watched(pixels)
    fisher = torch.zeros(64, 64)
    log_p = logits.log_softmax(-1)
    for image in range(6):
        for label in range(10):
            (g,) = torch.autograd.grad(log_p[image, label], y, retain_graph=True)
            fisher += log_p[image, label].exp().detach() * g[image].T @ g[image] / 6
    monkeypatch.setattr(whole_model, "DRAWS", 400)
    monkeypatch.setattr(stack_costs, "_SENSITIVITY_SHRINKAGE", 0.0)
    (found,) = (part.double() for part in measured("vit", pixels).of((LINEAR,)).sensitivities())
    # 2400 draws: a relative error of some per cent.
    error = (found.float() - fisher).norm() / fisher.norm()
    assert error < 0.15


def test_curves_fall_to_zero_and_are_those_of_every_stack() -> None:
    survey = measured("swin", torch.randn(12, *SHAPE))
    stacks = {len(members) for members in survey.curves}
    assert stacks == {1, 2, 3}
    for curve in survey.curves.values():
        assert (curve[:-1] >= curve[1:]).all()
        assert curve[-1] == 0 < curve[0]


def test_the_same_seed_gives_the_same_curves() -> None:
    pixels = torch.randn(8, *SHAPE)
    first, second = (measured("vit", pixels, seed=3).curves[LINEAR,] for _ in range(2))
    assert (first == second).all()


def test_values_that_are_not_finite_name_the_linear() -> None:
    model = tiny_classifier("vit")
    with torch.no_grad():
        model.vit.layers[0].mlp.fc1.weight.fill_(torch.inf)
    layers = ImageStructure.of(model, SHAPE).layers
    with pytest.raises(InputError, match="not finite") as caught:
        measure_whole(model, layers, torch.randn(4, *SHAPE), gradients=True)
    assert caught.value.details["where"] == "vit.layers.0.mlp.fc2"


def test_hooks_and_frozen_parameters_are_undone() -> None:
    survey = measured("vit", torch.randn(4, *SHAPE))
    assert all(parameter.requires_grad for parameter in survey.model.parameters())
    linear = survey.model.get_submodule(LINEAR)
    assert not linear._forward_hooks
    assert not linear._forward_pre_hooks
