"""A model whose factored layers call the operator computes what it did before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pipeline.checkpoint.modeling_quantized import QuantizedEmbedding, QuantizedLinear
from pipeline.checkpoint.modeling_skipcat import FactoredLinear
from pipeline.kernels import install
from pipeline.kernels.install import use_operator_
from tests.support.quantised_layers import fill_codes_


class Block(nn.Module):
    """Two layers that share a latent, one of its own, one in the other form."""

    def __init__(self) -> None:
        super().__init__()
        self.q = FactoredLinear(10, 6, 4, "skip", bias=True, dtype=torch.float64)
        self.k = FactoredLinear(10, 3, 4, "skip", owner=self.q, dtype=torch.float64)
        self.o = FactoredLinear(9, 10, 5, "skip", dtype=torch.float64)
        self.plain = FactoredLinear(10, 10, 3, "low_rank", dtype=torch.float64)
        for layer in (self.q, self.o):
            layer.permutation = torch.randperm(layer.in_features).to(torch.int32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.plain(self.o(torch.cat([self.q(x), self.k(x)], dim=-1)))


def test_the_model_computes_the_same() -> None:
    torch.manual_seed(0)
    block = Block()
    x = torch.randn(2, 3, 10, dtype=torch.float64)
    with torch.inference_mode():
        expected = block(x)
        assert use_operator_(block) == 3
        torch.testing.assert_close(block(x), expected)
        torch.testing.assert_close(block(x + 1), Block.forward(block, x + 1))
    assert isinstance(block.plain, FactoredLinear)


def test_layers_of_one_latent_take_one_call(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    calls = []

    def counted(*inputs: torch.Tensor) -> torch.Tensor:
        calls.append(inputs)
        return real(*inputs)

    real = install.block_skip_linear
    monkeypatch.setattr(install, "block_skip_linear", counted)
    block = Block()
    use_operator_(block)
    with torch.inference_mode():
        block(torch.randn(1, 10, dtype=torch.float64))
    assert len(calls) == 2


def test_a_repeated_input_is_computed_again_and_not_remembered() -> None:
    block = Block()
    use_operator_(block)
    x = torch.randn(1, 10, dtype=torch.float64)
    with torch.inference_mode():
        first = block(x)
        x.mul_(2)  # in place: the same tensor, other numbers
        assert not torch.allclose(block(x), first)


def test_the_factors_move_with_the_model_and_are_held_once() -> None:
    block = Block()
    use_operator_(block)
    names = [name for name, _ in block.named_buffers()]
    assert sorted(name.rsplit(".", 1)[1] for name in names) == [
        "a",
        "a",
        "b",
        "b",
        "index",
        "index",
    ]
    assert {buffer.dtype for buffer in block.float().buffers()} == {torch.float32, torch.int32}


def test_torch_compile_keeps_the_model_whole_and_compiles_it_once() -> None:
    block = Block()
    use_operator_(block)
    x = torch.randn(2, 3, 10, dtype=torch.float64)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    with torch.inference_mode():
        for scale in (1, 2, 3):
            torch.testing.assert_close(compiled(scale * x), block(scale * x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


class QuantizedBlock(nn.Module):
    """A table that is the head, layers of one latent, a dense one, and one in unread formats."""

    def __init__(self) -> None:
        super().__init__()
        single: dict[str, Any] = {"dtype": torch.float32}
        self.table = QuantizedEmbedding(40, 48, "int8-row-sym", **single)
        formats: dict[str, Any] = {"down_style": "int4-b16-sym", "up_style": "int8-row-sym"}
        self.q = FactoredLinear(48, 21, 17, "skip", bias=True, **formats, **single)
        self.k = FactoredLinear(48, 11, 17, "skip", owner=self.q, up_style="int8-row-sym", **single)
        self.mixed = FactoredLinear(32, 48, 16, "skip", up_style="int4-b16-sym", **single)
        self.unread = FactoredLinear(48, 48, 16, "skip", down_style="int4-b24-asym", **single)
        self.dense = QuantizedLinear(48, 48, "int4-b64-sym", bias=True, **single)
        self.lm_head = QuantizedLinear(48, 40, "", table=self.table, **single)
        for layer in (self.q, self.mixed, self.unread):
            layer.permutation = torch.randperm(layer.in_features).to(torch.int32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        x = self.mixed(torch.cat([self.q(x), self.k(x)], dim=-1))
        return self.lm_head(self.dense(self.unread(x)))


def quantized_block() -> QuantizedBlock:
    torch.manual_seed(0)
    block = QuantizedBlock()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    fill_codes_(block)
    return block


def test_a_model_of_codes_computes_the_same_and_holds_codes() -> None:
    block = quantized_block()
    ids = torch.tensor([[3, 39, 0, 12], [7, 7, 1, 38]])
    with torch.inference_mode():
        expected = block(ids)
        assert use_operator_(block) == 4 + 2
        near: dict[str, Any] = {"rtol": 0, "atol": 1e-5 * expected.abs().max().item()}
        torch.testing.assert_close(block(ids), expected, **near)
        torch.testing.assert_close(block(ids[:, :1]), expected[:, :1], **near)
    assert not [m for m in block.modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding)]
    codes = [b for b in block.buffers() if b.dtype == torch.int8]
    # q's A' and q and k's B', mixed's B', dense, and the head's, which the table reads.
    assert sorted(b.numel() for b in codes) == sorted([31 * 9, 17 * 32, 16 * 24, 48 * 24, 48 * 40])
    assert next(iter(block.half().table.state_dict()), None) is None


def test_formats_that_the_kernels_do_not_read_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    use_operator_(quantized_block())
    assert "held as numbers: 1 of int4-b24-asym" in capsys.readouterr().err


class OffsetBlock(nn.Module):
    """Layers in formats whose codes are not counted from the middle, or have few bits."""

    def __init__(self, down: str | None, up: str) -> None:
        super().__init__()
        single: dict[str, Any] = {"dtype": torch.float32}
        self.table = QuantizedEmbedding(40, 72, up, **single)
        self.q = FactoredLinear(72, 21, 33, "skip", down_style=down, up_style=up, **single)
        self.k = FactoredLinear(72, 51, 33, "skip", owner=self.q, up_style=up, **single)
        self.dense = QuantizedLinear(72, 72, up, bias=True, **single)
        self.lm_head = QuantizedLinear(72, 40, "", table=self.table, **single)
        self.q.permutation = torch.randperm(72).to(torch.int32)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        return self.lm_head(self.dense(torch.cat([self.q(x), self.k(x)], dim=-1)))


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("int4-b32-asym", "int4-b32-offset"),
        ("int4-b64-sym", "int2-b32-asym"),
        (None, "int3-b32-asym"),
        ("int6-b64-sym", "int8-b32-asym"),
        ("int8-row-asym", "int4-row-sym"),
    ],
)
def test_codes_with_zero_points_offsets_or_few_bits_stay_codes(
    down: str | None, up: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(1)
    block = OffsetBlock(down, up)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    fill_codes_(block)
    ids = torch.tensor([[3, 39, 0, 12], [7, 7, 1, 38]])
    with torch.inference_mode():
        expected = block(ids)
        assert use_operator_(block) == 4
        near: dict[str, Any] = {"rtol": 0, "atol": 2e-5 * expected.abs().max().item()}
        torch.testing.assert_close(block(ids), expected, **near)
    assert "held as numbers" not in capsys.readouterr().err
    # Bytes: those of W^T, one or two columns to a byte.
    sizes = [(33, 72, up), (72, 72, up), (72, 40, up), *([(39, 33, down)] if down else [])]
    stored = [rows * (m if int(name[3]) > 4 else -(-m // 2)) for rows, m, name in sizes]
    held = [buffer.numel() for buffer in block.buffers() if buffer.dtype == torch.int8]
    assert sorted(held) == sorted(stored)
