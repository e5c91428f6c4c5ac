"""What is found in a classifier by running it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.errors import InputError
from pipeline.model.classifier_structure import ImageStructure, _layer_of
from tests.support.classifiers import FAMILIES, tiny_classifier

SHAPE = (3, 16, 16)


def short_names(family: str) -> list[tuple[str, ...]]:
    structure = ImageStructure.of(tiny_classifier(family), SHAPE)
    return [
        tuple(member.rsplit(".", 1)[-1] for member in group.members)
        for layer in structure.layers
        for group in layer.groups
    ]


@pytest.mark.parametrize("family", ["vit", "deit", "deit-student"])
def test_every_layer_has_four_groups_and_the_first_is_q_k_v(family: str) -> None:
    layer = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("fc1",), ("fc2",)]
    assert short_names(family) == 2 * layer


def test_a_swin_has_its_blocks_stage_by_stage_and_the_merging_of_patches() -> None:
    block = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("fc1",), ("fc2",)]
    assert short_names("swin") == [*block, *block, ("reduction",), *block]


def test_inputs_of_an_image_are_counted_by_stage() -> None:
    rows = ImageStructure.of(tiny_classifier("swin"), SHAPE).rows
    assert rows["swin.encoder.layers.0.blocks.0.attention.q_proj"] == 64
    assert rows["swin.encoder.layers.0.downsample.reduction"] == 16
    assert rows["swin.encoder.layers.1.blocks.0.mlp.fc2"] == 16


@pytest.mark.parametrize("family", FAMILIES)
def test_head_and_embeddings_are_left_alone(family: str) -> None:
    model = tiny_classifier(family)
    members = [
        member
        for layer in ImageStructure.of(model, SHAPE).layers
        for group in layer.groups
        for member in group.members
    ]
    outside = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} - set(members)
    assert all("classifier" in name for name in outside)
    assert len(set(members)) == len(members)


def test_a_linear_that_is_run_twice_is_left_out_and_said() -> None:
    model = tiny_classifier("vit")
    layer = model.vit.layers[0]
    inner = layer.mlp.forward
    layer.mlp.forward = lambda x: inner(x) + layer.mlp.fc2(layer.mlp.fc1(x))
    structure = ImageStructure.of(model, SHAPE)
    assert structure.left_out["vit.layers.0.mlp.fc1"] == "it is run 2 times for one image"
    assert "vit.layers.0.mlp.fc1" not in structure.rows


def test_a_shared_weight_is_left_out_and_said() -> None:
    model = tiny_classifier("vit")
    first, second = model.vit.layers[0].mlp.fc1, model.vit.layers[1].mlp.fc1
    second.weight = first.weight
    left_out = ImageStructure.of(model, SHAPE).left_out
    assert set(left_out) == {"vit.layers.0.mlp.fc1", "vit.layers.1.mlp.fc1"}


def test_images_of_another_shape_than_the_model_takes_are_refused() -> None:
    with pytest.raises(InputError, match="does not take images"):
        ImageStructure.of(tiny_classifier("vit"), (3, 20, 20))


def test_the_layer_of_a_linear_is_the_innermost_element_of_a_list() -> None:
    model = tiny_classifier("swin")
    assert (
        _layer_of(model, "swin.encoder.layers.0.blocks.1.mlp.fc1")
        == "swin.encoder.layers.0.blocks.1"
    )
    assert _layer_of(model, "swin.encoder.layers.0.downsample.reduction") == "swin.encoder.layers.0"
    assert _layer_of(model, "classifier") == ""


def test_the_model_is_as_it_was() -> None:
    model = tiny_classifier("swin")
    pixels = torch.randn(2, *SHAPE)
    with torch.no_grad():
        before = model(pixel_values=pixels).logits
        ImageStructure.of(model, SHAPE)
        torch.testing.assert_close(model(pixel_values=pixels).logits, before, rtol=0, atol=0)
