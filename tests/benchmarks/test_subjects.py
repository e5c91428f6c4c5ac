"""Subjects have the function, or the low-bit file, of the model that they were made from."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.quality.subjects import command, dithered
from pipeline.errors import InputError
from tests.support.families import FAMILIES, save_family, tiny_model
from tests.support.tiny_decoder import byte_tokenizer

TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
KINDS = {"Q4_1": gguf.GGMLQuantizationType.Q4_1, "Q8_0": gguf.GGMLQuantizationType.Q8_0}


def on_grid(values: np.ndarray, kind: str) -> np.ndarray:
    """What llama.cpp's own package makes of numbers in one of its formats."""
    packed = gguf.quants.quantize(values, KINDS[kind])
    return gguf.quants.dequantize(packed, KINDS[kind])


def make(arguments: list[str]) -> str:
    answer = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    return answer.output


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma3_text"])
def test_a_rotated_subject_is_a_plain_model_with_the_same_function(
    family: str, tmp_path: Path
) -> None:
    source = save_family(tmp_path / "source", family)
    make(["rotated", str(source), "-o", str(tmp_path / "made"), "--seed", "2"])
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("source", "made")]
    with torch.no_grad():
        expected, found = (model(TOKENS).logits for model in models)
    assert float((expected - found).abs().max()) < 1e-4 * max(1, float(expected.abs().max()))
    weights = [model.model.layers[0].mlp.up_proj.weight for model in models]
    assert not torch.allclose(*weights)
    record = json.loads((tmp_path / "made" / "subject.json").read_text(encoding="utf-8"))
    assert (record["kind"], record["seed"], record["model"]) == ("rotated", 2, "source")


@pytest.mark.parametrize("kind", KINDS)
def test_dithered_weights_round_to_those_they_were_made_from(kind: str) -> None:
    values = np.random.default_rng(0).normal(size=(48, 96)).astype(np.float32)
    values[3, :32] = 0.0
    file = on_grid(values, kind)
    moved, found = dithered(torch.from_numpy(file), torch.Generator().manual_seed(0))
    assert found == kind
    np.testing.assert_array_equal(on_grid(moved.numpy(), kind), file)
    away = np.abs(moved.numpy() - file)
    step = np.abs(on_grid(values, kind) - values).max() * 2
    assert away.max() <= step
    # Uniform within half a step, but for what stays or is clipped.
    assert (away > 0).mean() > 0.8


def low_bit_model() -> PreTrainedModel:
    """A tiny model of 4 bits, but for its embedding, which has 8."""
    model = tiny_model("llama")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            kind = "Q8_0" if "embed" in name else "Q4_1"
            parameter.data = torch.from_numpy(on_grid(parameter.detach().numpy(), kind))
    return model


def test_a_dithered_subject_rounds_to_its_file(tmp_path: Path) -> None:
    model = low_bit_model()
    model.save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    make(["dithered", str(tmp_path / "source"), "-o", str(tmp_path / "made")])
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    for (name, was), (_, now) in zip(
        model.named_parameters(), made.named_parameters(), strict=True
    ):
        if was.ndim == 1:
            assert torch.equal(was, now), name
            continue
        assert not torch.equal(was, now), name
        kind = "Q8_0" if "embed" in name else "Q4_1"
        np.testing.assert_array_equal(
            on_grid(now.detach().numpy(), kind), was.detach().numpy(), err_msg=name
        )
    record = json.loads((tmp_path / "made" / "subject.json").read_text(encoding="utf-8"))
    assert record["matrices"] == {"Q8_0": 1, "Q4_1": 15}


def test_a_model_that_is_on_no_grid_is_refused(tmp_path: Path) -> None:
    source = save_family(tmp_path / "source", "llama")
    with pytest.raises(InputError, match="No matrix"):
        make(["dithered", str(source), "-o", str(tmp_path / "made")])
    assert not (tmp_path / "made").exists()
