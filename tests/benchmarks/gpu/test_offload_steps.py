"""The step over an offloaded model goes through its rows, and its bits hold on the CPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import offload_steps
from benchmarks.gpu.offload_steps import _layer_bytes, offload
from benchmarks.gpu.steps import Setting
from pipeline.bench.shapes import find_shape


def test_every_row_is_there_and_some_layers_are_copied() -> None:
    rows = dict(offload(Setting("cpu", 3)))
    assert [*rows] == [
        "bits", "drafted", "bus", "pass of 1", "pass of 17", "pass of 64", "overlap",
        "memory", "draft", "together",
    ]  # fmt: skip
    found = [v["verdict"] for row in rows.values() for v in row.get("verdicts", [])]
    assert sorted(found) == ["not judged", *["pass"] * 4]
    one = rows["pass of 1"]
    assert one["pass_bytes"] == one["pinned_bytes"] > 0
    assert one["resident"] == 1


def test_a_layer_has_the_bytes_of_its_matrices() -> None:
    layer = find_shape("llama-3.1-8b").empty_model().model.layers[0]
    numbers = sum(p.numel() for p in layer.parameters() if p.dim() > 1)
    assert _layer_bytes(find_shape("llama-3.1-8b")) == 2 * numbers


def test_a_copy_that_comes_too_late_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    own = offload_steps._PlainDevice.copy
    copied = []

    def late(self: offload_steps._PlainDevice, buffer: torch.Tensor, source: torch.Tensor) -> None:
        copied.append((buffer, source))
        if len(copied) % 5 and len(copied) > 1:
            own(self, *copied[-2])

    monkeypatch.setattr(offload_steps._PlainDevice, "copy", late)
    rows = offload(Setting("cpu", 3))
    assert next(rows)[1]["verdicts"][0]["verdict"] == "missed"
