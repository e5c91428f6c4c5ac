"""What a checkpoint becomes before it goes to a GPU, as far as the CPU can tell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.checkpoint.folder import load_checkpoint, save_checkpoint
from pipeline.checkpoint.install import group_entries, group_tensors, install_
from pipeline.compress.factorize.factors import Factors
from pipeline.runtime.sessions.open_session import load_narrow
from pipeline.runtime.sessions.static_session import StaticSession
from pipeline.runtime.sessions.torch_session import TorchSession
from tests.support.quantised_layers import save_low_bit_llama
from tests.support.tiny_decoder import VOCAB_SIZE, byte_tokenizer, tiny_llama

TOKENS = np.random.default_rng(1).integers(0, VOCAB_SIZE, (1, 12))


def save_compressed(folder: Path, dtype: torch.dtype) -> None:
    model = tiny_llama()
    members, rank = ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"), 8
    entries = group_entries(members, "skip", rank)
    up, down = torch.randn(128, rank), torch.randn(rank, 32 - rank)
    factors = Factors("skip", rank, up, down, torch.randperm(32), 0.0)
    stored = (factors.down, factors.up, factors.permutation)
    install_(model, entries, group_tensors(members, [64, 64], *stored, torch.float32))
    save_checkpoint(model, byte_tokenizer(), entries, folder, dtype)


@pytest.mark.parametrize(
    ("stored", "held"),
    [
        (torch.float32, torch.float16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_weights_are_halved_and_the_frequencies_of_the_rotation_are_not(
    tmp_path: Path, stored: torch.dtype, held: torch.dtype
) -> None:
    save_compressed(tmp_path, stored)
    model, replaced = load_narrow(tmp_path)
    assert replaced == 2
    assert model.dtype == held
    assert {parameter.dtype for parameter in model.parameters()} == {held}
    original = load_checkpoint(tmp_path, dtype=torch.float32)
    rotary, expected = (m.get_submodule("model.rotary_emb") for m in (model, original))
    assert torch.equal(rotary.get_buffer("inv_freq"), expected.get_buffer("inv_freq"))
    group = model.get_submodule("model.layers.0.mlp.gate_proj.group")
    assert group.get_buffer("product.a").dtype == group.get_buffer("product.b").dtype == held


def test_the_model_of_the_gpu_says_what_the_checkpoint_says(tmp_path: Path) -> None:
    save_compressed(tmp_path, torch.float16)
    expected = TorchSession(load_checkpoint(tmp_path, dtype=torch.float32)).forward(TOKENS)
    under_test = StaticSession(load_narrow(tmp_path)[0], "half", 64)
    pieces = [under_test.forward(TOKENS[:, a:b]) for a, b in ((0, 9), (9, 10), (10, 11), (11, 12))]
    error = np.linalg.norm(np.concatenate(pieces, 1) - expected) / np.linalg.norm(expected)
    assert error < 5e-3  # eleven bits of float16, through two layers


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_a_model_of_codes_stays_codes_and_says_what_the_checkpoint_says(
    tmp_path: Path, stored: torch.dtype
) -> None:
    expected = TorchSession(
        load_checkpoint(save_low_bit_llama(tmp_path, stored), dtype=torch.float32)
    )
    model, replaced = load_narrow(tmp_path)
    assert replaced == 2 * 7 + 1  # and the head, whose codes the table reads
    numbers = [b for b in (*model.parameters(), *model.buffers()) if b.is_floating_point()]
    # The largest are scales, of gate and up: no matrix is written out.
    assert max(b.numel() for b in numbers if b.dim() == 2) == 2 * 192
    answered = StaticSession(model, "half", 64).forward(TOKENS)
    wanted = expected.forward(TOKENS)
    bits = 8 if stored == torch.bfloat16 else 11
    assert np.linalg.norm(answered - wanted) / np.linalg.norm(wanted) < 2 ** (3 - bits)
