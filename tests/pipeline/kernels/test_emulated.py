"""A model of codes by PyTorch's operator, its kernels compiled for the CPU, thread by thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.checkpoint.folder import load_checkpoint
from pipeline.kernels import install, op, quantized_op
from pipeline.kernels.interface import Device, open_library
from pipeline.kernels.quantized_op import block_skip_linear_quantized
from pipeline.runtime.sessions.open_session import load_narrow
from pipeline.runtime.sessions.static_session import StaticSession
from pipeline.runtime.sessions.torch_session import TorchSession
from tests.support.emulated import compile_library
from tests.support.quantised_layers import save_low_bit_llama

PROMPT = np.array([[5, 9, 77, 30, 2, 61, 8, 14, 3, 3]])
TOKENS = 64


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return open_library(compile_library(tmp_path_factory.mktemp("emulated")))


def greedy(session: TorchSession | StaticSession) -> list[int]:
    """The prompt in one call, which is more than the decode kernels take, then token by token."""
    ids, answer = PROMPT, []
    for _ in range(TOKENS):
        ids = session.forward(ids, last_only=True)[:, -1:].argmax(-1)
        answer.append(int(ids[0, 0]))
    return answer


@pytest.fixture
def calls(library: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """The operator runs the emulated kernels; every call of it is noted here."""
    counters = torch.zeros(1 << 12, dtype=torch.int32)
    noted: list[torch.Tensor] = []

    def launched(*given: Any) -> torch.Tensor:
        noted.append(quantized_op._launch(*given))
        return noted[-1]

    monkeypatch.setattr(op, "_library_for", lambda capability: library)
    monkeypatch.setattr(op, "_device_of", lambda index: Device(4, 90))
    monkeypatch.setattr(op, "_counters_for", lambda *_: counters.data_ptr())
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(install, "block_skip_linear_quantized", launched)
    yield noted
    assert not counters.any()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_tokens_of_the_kernels_are_those_of_the_checkpoint(
    calls: list[torch.Tensor], tmp_path: Path
) -> None:
    folder = save_low_bit_llama(tmp_path / "checkpoint")
    reference = load_checkpoint(folder, dtype=torch.float32)
    expected = greedy(TorchSession(reference, "torch float32"))
    model, _ = load_narrow(folder)
    # As `skipcat run --device cuda` runs it.
    assert greedy(StaticSession(model, "kernels", 96)) == expected
    # Two layers of four groups each, and the head.
    assert len(calls) == TOKENS * (2 * 4 + 1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_products_in_formats_for_the_cpu_are_those_of_double_precision(
    calls: list[torch.Tensor], tmp_path: Path
) -> None:
    others = {"int4-b64-sym": "int4-b32-asym", "int8-row-sym": "int4-b64-asym"}
    model, _ = load_narrow(save_low_bit_llama(tmp_path / "checkpoint", others=others))
    products = [module for module in model.modules() if isinstance(module, install._Codes)]
    assert len(products) == 2 * 4 + 1
    torch.manual_seed(0)
    for product in products:
        down = 0 if product.down is None else len(product.down.stored)
        for rows in (1, 10):
            x = torch.randn(rows, len(product.up.stored) + down).half()
            with torch.inference_mode():
                found = product(x).double()
                with pytest.MonkeyPatch.context() as plain:
                    plain.setattr(
                        install, "block_skip_linear_quantized", block_skip_linear_quantized
                    )
                    exact = product.double()(x.double())
                product.half()
            assert (found - exact).norm() <= 1e-3 * exact.norm()
    # A latent with zero points takes two calls.
    assert len(calls) == 2 * (2 * 6 + 1)
