"""A model of codes by PyTorch's operator, its kernels compiled for the CPU, thread by thread."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.checkpoint.folder import load_checkpoint
from pipeline.kernels import install, op, quantized_op
from pipeline.kernels.interface import Device, open_library
from pipeline.runtime.sessions.open_session import _load_half
from tests.support.emulated import compile_library
from tests.support.quantised_layers import save_low_bit_llama

PROMPT = torch.tensor([[5, 9, 77, 30, 2, 61, 8, 14, 3, 3]])
TOKENS = 64


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return open_library(compile_library(tmp_path_factory.mktemp("emulated")))


def greedy(model: torch.nn.Module) -> list[int]:
    """The prompt in one call, which is more than the decode kernels take, then token by token."""
    ids, cache, answer = PROMPT, None, []
    with torch.inference_mode():
        for _ in range(TOKENS):
            output = model(ids, past_key_values=cache, use_cache=True)
            cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
            answer.append(int(ids))
    return answer


@pytest.mark.slow
def test_tokens_of_the_kernels_are_those_of_the_checkpoint(
    library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_low_bit_llama(tmp_path / "checkpoint")
    expected = greedy(load_checkpoint(folder, dtype=torch.float32))
    counters = torch.zeros(1 << 12, dtype=torch.int32)
    calls = itertools.count()

    def launched(*given: Any) -> torch.Tensor:
        next(calls)
        return quantized_op._launch(*given)

    monkeypatch.setattr(op, "_library_for", lambda capability: library)
    monkeypatch.setattr(op, "_device_of", lambda index: Device(4, 90))
    monkeypatch.setattr(op, "_counters_for", lambda *_: counters.data_ptr())
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(install, "block_skip_linear_quantized", launched)
    model, _ = _load_half(folder)
    assert greedy(model) == expected
    # Two layers of four groups each, and the head.
    assert next(calls) == TOKENS * (2 * 4 + 1)
    assert not counters.any()
