"""A program is traced a second time only where that would find other operators."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.onnx._internal.exporter import _fx_passes

from pipeline.export import decomposing
from pipeline.export.decomposing import decomposed
from pipeline.export.export import export_folder
from pipeline.export.request import ExportRequest
from tests.support.families import save_family


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Programs that were traced again, by what they hold."""
    own, seen = decomposing._TRACED_AGAIN, list[str]()

    def counted(program: Any, registry: Any) -> Any:
        seen.append(str(program.graph))
        return own(program, registry)

    monkeypatch.setattr(decomposing, "_TRACED_AGAIN", counted)
    monkeypatch.setattr(_fx_passes, "decompose_with_registry", decomposed)
    return seen


class Casts(nn.Module):
    """All that has a twin: casts to the own type and to another, also as the output; strides."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        half = x.to(torch.float16).to(torch.float16)
        mixed = x.transpose(0, 1).contiguous().reshape(-1)
        both = (mask & (x > 0)) | (x < -1)
        return half, x.transpose(0, 1).reshape(-1), mixed, both, (x + 1).to(torch.float32)


class InPlace(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y.add_(1)
        return y


class Composed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.entr(x.abs() + 0.1)


def ran(module: nn.Module, *inputs: torch.Tensor) -> list[np.ndarray]:
    """What ONNX Runtime makes of a module's export."""
    lengths = {0: torch.export.Dim.DYNAMIC}
    program = torch.onnx.export(
        module.eval(),
        inputs,
        dynamo=True,
        verbose=False,
        dynamic_shapes=tuple(lengths for _ in inputs),
    )
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [node.name for node in session.get_inputs()]
    feeds = {name: one.numpy() for name, one in zip(names, inputs, strict=True)}
    return list(session.run(None, feeds))


def test_twins_compute_what_the_operators_do(again: list[str]) -> None:
    x, mask = torch.randn(5, 3), torch.rand(5, 3) > 0.5
    found = ran(Casts(), x, mask)
    assert again == []
    for own, expected in zip(found, Casts()(x, mask), strict=True):
        np.testing.assert_array_equal(own, expected.numpy())


@pytest.mark.parametrize("module", [InPlace(), Composed()])
def test_what_changes_a_tensor_or_has_no_translation_is_traced_again(
    module: nn.Module, again: list[str]
) -> None:
    x = torch.randn(5, 3)
    (found,) = ran(module, x)
    assert len(again) == 1
    np.testing.assert_allclose(found, module(x).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "profile", "dtype"),
    [
        ("smollm", "opset24", "float16"),
        pytest.param("gemma3_text", "opset24", "float32", marks=pytest.mark.slow),
        pytest.param("qwen3", "compat", "float32", marks=pytest.mark.slow),
    ],
)
def test_a_decoder_is_traced_once_into_the_nodes_that_two_traces_find(
    family: str, profile: str, dtype: str, again: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder, request = save_family(tmp_path / "model", family), ExportRequest(profile, dtype, 64)
    export_folder(folder, tmp_path / "once", request)
    assert again == []
    monkeypatch.setattr("pipeline.export.tracing.decomposed", decomposing._TRACED_AGAIN)
    export_folder(folder, tmp_path / "twice", request)
    assert len(again) > 0
    once, twice = (
        Counter(node.op_type for node in onnx.load(tmp_path / name / "model.onnx").graph.node)
        for name in ("once", "twice")
    )
    assert once == twice
