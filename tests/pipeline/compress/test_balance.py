"""Scaling channels changes no output, and gives up where a norm does not allow it."""

from __future__ import annotations

import pytest
import torch

from pipeline.compress.balance import balance_
from pipeline.model.structure import decoder_structure
from tests.families import FAMILIES, tiny_model

TOKENS = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_output_changes(family: str) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        before = model(TOKENS).logits
        balance_(model, decoder_structure(model), TOKENS, 0.5)
        after = model(TOKENS).logits
    assert float((before - after).abs().max()) < 1e-5 * float(before.abs().max())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_group_behind_a_norm_is_scaled(family: str) -> None:
    model = tiny_model(family)
    weight = model.model.layers[0].self_attn.q_proj.weight.clone()
    names = balance_(model, decoder_structure(model), TOKENS, 0.5)
    assert [name.rsplit(".", 1)[-1] for name in names] == ["q_proj", "gate_proj"] * 2
    assert not torch.equal(weight, model.model.layers[0].self_attn.q_proj.weight)


def test_gains_that_are_added_to_one_are_found_out_and_left_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny_model("gemma3_text")
    assert balance_(model, decoder_structure(model), TOKENS, 0.5) == []
    assert "not scaled" in capsys.readouterr().err
