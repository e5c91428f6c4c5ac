"""Scaling channels changes no output, and gives up where a norm does not allow it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.models import save_tiny_folder
from pipeline.compress.channel_scaling import _channel_scales, scale_channels_
from pipeline.compress.request import CompressRequest
from pipeline.compress.run import compress_to_folder, plan_only
from pipeline.model.structure import decoder_structure
from tests.support.families import FAMILIES, tiny_model

TOKENS = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_output_changes(family: str) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        before = model(TOKENS).logits
        scale_channels_(model, decoder_structure(model), TOKENS, 0.5)
        after = model(TOKENS).logits
    assert float((before - after).abs().max()) < 1e-5 * float(before.abs().max())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_group_behind_a_norm_is_scaled(family: str) -> None:
    model = tiny_model(family)
    weight = model.model.layers[0].self_attn.q_proj.weight.clone()
    names = scale_channels_(model, decoder_structure(model), TOKENS, 0.5)
    assert [name.rsplit(".", 1)[-1] for name in names] == ["q_proj", "gate_proj"] * 2
    assert not torch.equal(weight, model.model.layers[0].self_attn.q_proj.weight)


def test_gains_that_are_added_to_one_are_found_out_and_left_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny_model("gemma3_text")
    assert scale_channels_(model, decoder_structure(model), TOKENS, 0.5) == []
    assert "not scaled" in capsys.readouterr().err


SIZES = torch.tensor([8.0, 1.0, 0.5, 2.0], dtype=torch.float64)
MOMENT = torch.diag(SIZES.square())


def test_power_one_makes_all_inputs_equally_large() -> None:
    scaled = SIZES / _channel_scales(MOMENT, 1.0)
    torch.testing.assert_close(scaled, scaled.mean().expand(4))


def test_half_of_the_power_halves_the_spread_on_a_logarithmic_scale() -> None:
    scaled = (SIZES / _channel_scales(MOMENT, 0.5)).log()
    assert float(scaled.std()) == pytest.approx(float(SIZES.log().std()) / 2)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_scales_have_geometric_mean_one(power: float) -> None:
    assert float(_channel_scales(MOMENT, power).log().mean()) == pytest.approx(0, abs=1e-12)


def test_nothing_is_scaled_by_power_zero_or_for_an_input_that_is_always_zero() -> None:
    ones = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(_channel_scales(MOMENT, 0.0), ones)
    torch.testing.assert_close(_channel_scales(0 * MOMENT, 0.5), ones)


@pytest.mark.parametrize(("moment", "power"), [(MOMENT, 1.5), (MOMENT * float("nan"), 0.5)])
def test_powers_out_of_range_and_broken_moments_are_refused(
    moment: torch.Tensor, power: float
) -> None:
    with pytest.raises(ValueError, match=r"outside|NaN"):
        _channel_scales(moment, power)


def test_the_plan_that_is_shown_is_of_scaled_channels_as_the_one_that_is_followed(
    tmp_path: Path,
) -> None:
    source = save_tiny_folder(tmp_path / "source")
    (tmp_path / "text.txt").write_text("Whales sing, and people listen to them. " * 200)
    request = CompressRequest(
        str(source), 0.7, balance=1.0, effort="fast", calibration=str(tmp_path / "text.txt"),
        windows=16, window_length=32,
    )  # fmt: skip
    compress_to_folder(request, tmp_path / "small")
    plan_only(request).save(tmp_path / "shown.json")
    assert (tmp_path / "shown.json").read_text() == (tmp_path / "small" / "plan.json").read_text()
