"""Rotations change no output, wherever the structure lets them through; elsewhere they say why."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.checkpoint.folder import load_checkpoint
from pipeline.compress import run
from pipeline.compress.channel_scaling import scale_channels_
from pipeline.compress.plan.plan import RankPlan, uniform_plan
from pipeline.compress.request import CompressRequest
from pipeline.compress.rotation import rotate_
from pipeline.compress.run import compress_to_folder
from pipeline.compress.walk import compress_
from pipeline.errors import InputError, UsageError
from pipeline.export.export import export_folder
from pipeline.export.request import ExportRequest
from pipeline.model.structure import decoder_structure
from pipeline.runtime.sessions.open_session import open_session
from tests.support.families import FAMILIES, save_family, tiny_model
from tests.support.tiny_survey import calibrated, divergence

TOKENS = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(0))
FOLDING = [family for family in FAMILIES if family != "gemma3_text"]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(TOKENS).logits
    return logits


@pytest.mark.parametrize("family", FOLDING)
def test_the_output_of_a_turned_model_is_what_it_was(family: str) -> None:
    model = tiny_model(family)
    before, layer = logits(model), model.model.layers[0]
    weights = [layer.self_attn.v_proj.weight, layer.mlp.down_proj.weight]
    weights += [model.model.embed_tokens.weight, model.lm_head.weight]
    were = [weight.detach().clone() for weight in weights]
    done = rotate_(model, decoder_structure(model), "all", 3)
    # float32 sums in another order.
    assert float((logits(model) - before).abs().max()) < 1e-4 * max(1, float(before.abs().max()))
    assert all(not torch.allclose(w, old) for w, old in zip(weights, were, strict=True))
    assert torch.equal(layer.input_layernorm.weight, torch.ones_like(layer.input_layernorm.weight))
    assert done.width == model.config.hidden_size


@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_turned_in_every_family(family: str) -> None:
    model = tiny_model(family)
    before = logits(model)
    attention = model.model.layers[1].self_attn
    value = attention.v_proj.weight.detach().clone()
    gain = model.model.norm.weight.detach().clone()
    assert rotate_(model, decoder_structure(model), "values", 0).added_parameters == 0
    assert float((logits(model) - before).abs().max()) < 1e-4 * max(1, float(before.abs().max()))
    assert not torch.allclose(attention.v_proj.weight, value)
    assert torch.equal(model.model.norm.weight, gain)


def test_a_head_that_was_the_embedding_has_a_matrix_of_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny_model("smollm")
    done = rotate_(model, decoder_structure(model), "all", 0)
    assert done.added_parameters == model.lm_head.weight.numel()
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not model.config.tie_word_embeddings
    assert "matrix of its own" in capsys.readouterr().err


def test_a_seed_draws_one_rotation_and_other_seeds_others() -> None:
    turned = []
    for seed in (1, 1, 2):
        model = tiny_model("llama")
        rotate_(model, decoder_structure(model), "all", seed)
        turned.append(model.model.layers[0].mlp.gate_proj.weight)
    assert torch.equal(turned[0], turned[1])
    assert not torch.allclose(turned[0], turned[2])


def test_channels_of_a_turned_model_can_be_scaled() -> None:
    model = tiny_model("llama")
    before = logits(model)
    layers = decoder_structure(model)
    rotate_(model, layers, "all", 0)
    assert len(scale_channels_(model, layers, TOKENS, 0.5)) == 4
    assert float((logits(model) - before).abs().max()) < 1e-4 * float(before.abs().max())


def test_an_outlier_among_the_channels_is_spread() -> None:
    """The largest weight, over the root mean square of all of its matrix."""

    def peak(weight: torch.Tensor) -> float:
        size = weight.detach().abs()
        return float(size.max() / size.square().mean().sqrt())

    model = tiny_model("llama")
    gate = model.model.layers[0].mlp.gate_proj.weight
    with torch.no_grad():
        gate[:, 3] *= 30
    before = peak(gate)
    rotate_(model, decoder_structure(model), "all", 0)
    assert peak(gate) < 0.8 * before


def layer_norms() -> nn.Module:
    config = AutoConfig.for_model(
        "stablelm", vocab_size=272, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, use_parallel_residual=False,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def gains_behind_matrices() -> nn.Module:
    return tiny_model("gemma3_text")


def half_precision() -> nn.Module:
    return tiny_model("llama").bfloat16()


@pytest.mark.parametrize(
    ("make", "observed"),
    [
        (layer_norms, "subtracts a mean"),
        (gains_behind_matrices, "feeds no matrix"),
        (half_precision, "held in bfloat16"),
    ],
)
def test_what_stands_in_the_way_is_said(make, observed: str) -> None:  # type: ignore[no-untyped-def]
    model = make()
    with pytest.raises(InputError, match="does not fold") as raised:
        rotate_(model, decoder_structure(model), "all", 0)
    assert observed in str(raised.value)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Calibration text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("Whales sing, and people listen to them. " * 200)
    return str(path)


def compress(source: Path, output: Path, text: str, resume: bool = False, **settings: Any) -> Any:
    """The report of a compression of a tiny model."""
    wanted: dict[str, Any] = {"effort": "fast", "windows": 16, "window_length": 32} | settings
    request = CompressRequest(str(source), calibration=text, **wanted)
    return compress_to_folder(request, output, resume=resume)


@pytest.fixture(scope="module")
def turned(text: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """A model with one matrix as embedding and head, the same turned, and the report of that."""
    root = tmp_path_factory.mktemp("turned")
    source = save_family(root / "source", "smollm")
    report = compress(source, root / "turned", text, keep_params=1.0, rotate="all", dtype="float32")
    return source, root / "turned", report


def test_a_turned_checkpoint_is_a_plain_model_of_the_same_function(
    turned: tuple[Path, Path, Any],
) -> None:
    source, made, report = turned
    expected, found = (logits(AutoModelForCausalLM.from_pretrained(p)) for p in (source, made))
    assert float((expected - found).abs().max()) < 1e-4 * float(expected.abs().max())
    recipe = json.loads((made / "recipe.json").read_text(encoding="utf-8"))
    head = 272 * 48
    rotation = {"turned": "all", "seed": 0, "width": 48, "added_parameters": head}
    assert recipe["rotation"] == rotation
    assert report["totals"]["total_after"] == report["totals"]["total_before"] + head


def test_the_graph_of_a_turned_model_is_that_of_any_other_with_such_a_head(
    turned: tuple[Path, Path, Any],
) -> None:
    configs = [json.loads((p / "config.json").read_text(encoding="utf-8")) for p in turned[:2]]
    assert configs[0] | {"tie_word_embeddings": False} == configs[1]


@pytest.mark.parametrize("profile", ["opset24", pytest.param("cpu", marks=pytest.mark.slow)])
def test_onnx_runtime_gives_the_logits_of_the_model_before_it_was_turned(
    profile: str, turned: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    source, made, _ = turned
    request = ExportRequest(profile, "float32", max_length=32, weights="float")
    export_folder(made, tmp_path / "onnx", request)
    expected = logits(AutoModelForCausalLM.from_pretrained(source))[0].numpy()
    found = open_session(tmp_path / "onnx").forward(TOKENS[:1].numpy())
    assert np.abs(found.reshape(expected.shape) - expected).max() < 1e-4 * np.abs(expected).max()


def test_ranks_bits_channel_scales_and_a_smaller_cache_follow_a_rotation(
    turned: tuple[Path, Path, Any], text: str, tmp_path: Path
) -> None:
    report = compress(
        turned[0], tmp_path / "small", text, rotate="all", keep_bytes=0.6, keep_cache=0.5,
        balance=0.5, runtime="any",
    )  # fmt: skip
    # Of the model as it was given, whose head took no bytes.
    assert report["totals"]["stored_bytes"] <= 0.6 * 2 * report["totals"]["total_before"]
    model = load_checkpoint(tmp_path / "small", dtype=torch.float32)
    assert torch.isfinite(logits(model)).all()
    # Layers that were finished are turned by another matrix under another seed.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_build_report", None)  # Fails behind the last layer.
        with pytest.raises(TypeError):
            compress(turned[0], tmp_path / "other", text, rotate="all")
    with pytest.raises(InputError, match="settings") as raised:
        compress(turned[0], tmp_path / "other", text, rotate="values", resume=True)
    assert "rotate" in str(raised.value)


def test_streamed_weights_are_not_turned() -> None:
    with pytest.raises(UsageError, match="held in float32"):
        CompressRequest("x", rotate="values", stream_weights=True).check()


def test_three_bits_lose_less_of_a_turned_model_with_outliers() -> None:
    """Rounded alone, by rows: a few large channels spoil the steps of all others."""
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for norm, readers in (
                (layer.input_layernorm, [layer.self_attn.q_proj, layer.self_attn.k_proj]),
                (layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj]),
            ):
                norm.weight[3] /= 40
                for reader in readers:
                    reader.weight[:, 3] *= 40
    losses = []
    for what in ("off", "all"):
        copied = copy.deepcopy(model)
        layers = decoder_structure(copied)
        if what != "off":
            rotate_(copied, layers, what, 0)
        plan = uniform_plan(layers, 1.0)
        groups = {
            name: tuple(replace(g, up_format="int3-row-asym", reason=None) for g in planned)
            for name, planned in plan.layers.items()
        }
        compress_(calibrated(copied, layers), RankPlan(groups, {}), dtype=torch.float32)
        losses.append(divergence(model, copied))
    assert losses[1] < 0.7 * losses[0]
