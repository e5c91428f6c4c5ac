"""Bytes that the search counts are bytes that are stored."""

from __future__ import annotations

import pytest
import torch

from pipeline.compress.factorize.factors import Form
from pipeline.compress.factorize.whitened_svd import InputMoments
from pipeline.compress.fit_group import fit_group
from pipeline.compress.methods import _RTN, Fit
from pipeline.compress.plan import file_bytes as stored_bytes
from pipeline.compress.plan.file_bytes import group_bytes, matrix_bytes
from pipeline.compress.plan.plan import GroupPlan
from pipeline.quantize.formats import RUNTIMES, Format
from tests.support.tiny_survey import surveyed

QKV = tuple(f"model.layers.0.self_attn.{kind}_proj" for kind in "qkv")
DOWN = ("model.layers.1.mlp.down_proj",)
FORMATS = (None, "int2-b16-asym", "int3-b32-asym", "int4-b64-sym", "int6-b16-sym", "int8-row-sym")


def tensors_of(group: GroupPlan) -> dict[str, torch.Tensor]:
    tiny = surveyed("llama")
    moment = torch.eye(group.columns, dtype=torch.float64)
    fit = Fit(two_sided=False, quantize=_RTN)
    weights = [tiny.model.get_submodule(member).weight.detach() for member in group.members]
    return fit_group(group, weights, InputMoments(moment), None, fit, torch.float16).tensors


@pytest.mark.parametrize("members", [QKV, DOWN], ids=["three members", "one member"])
@pytest.mark.parametrize(
    ("form", "down", "up"),
    [("dense", None, style) for style in FORMATS[1:]]
    + [
        (form, down, up)
        for form in ("skip", "low_rank")
        for down in FORMATS[::2]
        for up in FORMATS
        if up or down
    ],
)
def test_but_for_names_the_bytes_of_a_group_are_those_of_its_tensors(
    members: tuple[str, ...],
    form: Form,
    down: str | None,
    up: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = surveyed("llama").model
    rows = sum(len(model.get_submodule(member).weight) for member in members)
    columns = model.get_submodule(members[0]).weight.shape[1]
    rank = min(rows, columns) if form == "dense" else 13
    group = GroupPlan(members, rows, columns, form, rank, None, None, down, up)
    with monkeypatch.context() as patch:
        patch.setattr(stored_bytes, "_NAME_BYTES", 0)
        counted = group_bytes(group, RUNTIMES["any"])
    tensors = tensors_of(group)
    assert counted == sum(t.numel() * t.element_size() for t in tensors.values())
    names = group_bytes(group, RUNTIMES["any"]) - counted
    assert names >= len(tensors) * 100  # a safetensors entry is about as long


@pytest.mark.parametrize("name", ["int4-b32-asym", "int8-b64-sym"])
def test_a_runtime_that_holds_scales_in_four_bytes_pays_for_them(name: str) -> None:
    style = Format.parse(name)
    cpu, any_ = (matrix_bytes(30, 100, style, RUNTIMES[runtime]) for runtime in ("cpu", "any"))
    assert cpu - any_ == 2 * 30 * style.blocks(100)
