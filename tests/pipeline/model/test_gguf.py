"""What a GGUF file says of its model reaches the model, or the file is refused by what it says."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pipeline.errors import InputError
from pipeline.memory import peak_bytes
from pipeline.model.load import load_model
from tests.support.families import tiny_model
from tests.support.gguf_files import write_llama_gguf

TOKENS = torch.arange(200)[None] % 250
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def scaled(**angles: Any) -> PreTrainedModel:
    return tiny_model("llama", head_dim=16, rope_parameters={"rope_theta": 10000.0} | angles)


def divisors(model: PreTrainedModel) -> np.ndarray:
    """What llama.cpp's converter writes: plain frequencies over those of the model."""
    config = model.config
    found, _ = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, "cpu")
    plain = 1 / config.rope_parameters["rope_theta"] ** (torch.arange(0, 16, 2).float() / 16)
    return (plain / found).numpy().astype(np.float32)


def require_same(path: Path, model: PreTrainedModel) -> None:
    loaded = load_model(str(path))
    torch.testing.assert_close(logits(loaded.model), logits(model), rtol=1e-4, atol=1e-4)


def test_a_plain_file_is_the_model_it_was_made_of(tmp_path: Path) -> None:
    model = scaled(rope_type="default")
    require_same(write_llama_gguf(tmp_path / "a.gguf", model), model)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"original_max_position_embeddings": 100, "high_freq_factor": 5.0},
        {"original_max_position_embeddings": 1000, "low_freq_factor": 2.0, "factor": 32.0},
    ],
)
def test_the_rotary_factors_of_llama_3_are_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = scaled(**LLAMA3 | changes)
    factors = {"rope_freqs.weight": divisors(model)}
    assert factors["rope_freqs.weight"].max() == pytest.approx(
        model.config.rope_parameters["factor"]
    )
    path = write_llama_gguf(tmp_path / "a.gguf", model, tensors=factors)
    require_same(path, model)


@pytest.mark.parametrize(
    ("keys", "angles"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
         {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
          "rope.scaling.original_context_length": 64},
         {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
        ({"rope.scaling.type": "none", "rope.scaling.finetuned": False},
         {"rope_type": "default"}),
    ],
)  # fmt: skip
def test_scaled_angles_are_read(
    tmp_path: Path, keys: dict[str, Any], angles: dict[str, Any]
) -> None:
    model = scaled(**angles)
    require_same(write_llama_gguf(tmp_path / "a.gguf", model, keys), model)


@pytest.mark.parametrize(
    "keys",
    [
        {"attn_logit_softcapping": 30.0},
        {"final_logit_softcapping": 30.0},
        {"attention.sliding_window": 16},
        {"attention.scale": 0.5},
        {"attention.clamp_kqv": 8.0},
        {"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0},
        {"rope.scaling.attn_factor": 1.2},
        {"logit_scale": 0.25},
        {"attention.value_length": 8},
        {"attention.causal": False},
        {"attention.temperature_length": 4},
        {"use_parallel_residual": True},
        {"something_new": 1},
    ],
)
def test_a_key_that_the_config_cannot_say_is_refused(tmp_path: Path, keys: dict[str, Any]) -> None:
    path = write_llama_gguf(tmp_path / "a.gguf", scaled(rope_type="default"), keys)
    with pytest.raises(InputError, match=next(iter(keys))):
        load_model(str(path))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.0.attn_q.bias", (64,)),
        ("blk.1.attn_q_norm.weight", (16,)),
        ("blk.0.attn_sinks.weight", (4,)),
        ("rope_factors_long.weight", (8,)),
        ("output.bias", (272,)),
    ],
)
def test_a_tensor_that_the_model_has_no_place_for_is_refused(
    tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    extra = {name: np.full(shape, 0.5, np.float32)}
    path = write_llama_gguf(tmp_path / "a.gguf", scaled(rope_type="default"), tensors=extra)
    with pytest.raises(InputError, match=name):
        load_model(str(path))


def test_rotary_factors_of_no_known_kind_are_refused(tmp_path: Path) -> None:
    odd = {"rope_freqs.weight": np.array([1, 3, 1, 2, 5, 1, 1, 8], np.float32)}
    path = write_llama_gguf(tmp_path / "a.gguf", scaled(rope_type="default"), tensors=odd)
    with pytest.raises(InputError, match=r"rope_freqs\.weight"):
        load_model(str(path))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.block_count", (4, 2**31), "block_count = 2147483648"),
        ("llama.attention.head_count", (4, 2**20), "head_count = 1048576"),
        ("llama.rope.dimension_count", (4, 2**31), "dimension_count = 2147483648"),
        ("llama.feed_forward_length", (4, 2**32 - 1), "feed_forward_length = 4294967295"),
        # An array that ends behind the file: one of the readers would go on for as long as it says.
        ("tokenizer.ggml.bos_token_id", (9, 4, 0, 256), "could not be loaded"),
    ],
)
def test_what_a_header_says_is_held_against_the_file_before_it_is_believed(
    tmp_path: Path, key: str, value: tuple[int, ...], message: str
) -> None:
    path = write_llama_gguf(tmp_path / "a.gguf", scaled(rope_type="default"))
    content = path.read_bytes()
    place = content.index(key.encode()) + len(key)
    field = struct.pack(f"<{len(value)}I", *value)  # its type, and what it is
    path.write_bytes(content[:place] + field + content[place + len(field) :])
    before_bytes = peak_bytes()
    with pytest.raises(InputError, match=message):
        load_model(str(path))
    assert peak_bytes() - before_bytes < 2**28


def test_a_gguf_file_that_ends_within_its_tensors_is_refused(tmp_path: Path) -> None:
    path = write_llama_gguf(tmp_path / "a.gguf", scaled(rope_type="default"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="is truncated"):
        load_model(str(path))
