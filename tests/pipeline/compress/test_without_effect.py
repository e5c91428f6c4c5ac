"""Groups that change nothing cost nothing: the plan says so, and nothing fails over them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from pipeline.compress.request import CompressRequest
from pipeline.compress.run import compress_to_folder
from tests.support.families import tiny_model
from tests.support.tiny_decoder import byte_tokenizer


def no_way_out(model: PreTrainedModel) -> str:
    """The last layer's feed-forward is multiplied by nothing."""
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    return "model.layers.1.mlp.gate_proj"


def no_way_in(model: PreTrainedModel) -> str:
    """The first layer's attention is given nothing."""
    model.model.layers[0].input_layernorm.weight.data.zero_()
    return "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("break_", [no_way_out, no_way_in])
@pytest.mark.parametrize("settings", [{}, {"keep_bytes": 0.7}, {"method": "svd-llm-v2"}])
def test_a_group_without_effect_costs_nothing(
    break_: Callable[[PreTrainedModel], str], settings: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    name = break_(model)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    request = CompressRequest(
        str(tmp_path / "model"), calibration="self", windows=4, window_length=32, **settings
    )
    compress_to_folder(request, tmp_path / "small")
    plan = json.loads((tmp_path / "small" / "plan.json").read_text(encoding="utf-8"))
    groups = [group for layer in plan["layers"].values() for group in layer]
    (found,) = [group for group in groups if name in group["members"]]
    if "method" not in settings:  # those that expect a KL
        assert found["expected_kl"] == pytest.approx(0, abs=1e-9)
    assert torch.isfinite(torch.tensor([group.get("expected_kl") or 0.0 for group in groups])).all()
