"""A cache of codes: what the node computes is what PyTorch computes with the same rounding."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.cli.main import main
from pipeline.errors import InputError, UsageError
from pipeline.export.export import _write_graph, export_folder, prove_model
from pipeline.export.prove import prove
from pipeline.export.request import ExportRequest
from pipeline.export.rounded_cache import empty_cache, read_rounding, rounding_of
from pipeline.quantize.cache_rounding import CacheRounding
from pipeline.runtime.sessions.onnx_cpu_session import CpuSession
from pipeline.runtime.sessions.torch_session import TorchSession
from tests.support.families import tiny_model
from tests.support.tiny_decoder import shared_export, shared_rounded_export, tiny_llama

IDS = np.random.default_rng(0).integers(0, 250, size=(1, 90))


def test_the_node_computes_what_pytorch_does_with_the_same_rounding() -> None:
    folder, model = shared_rounded_export(), tiny_llama()
    rounding = read_rounding(folder)
    rounded = TorchSession(model, cache=lambda: empty_cache(model.config, rounding))
    expected, plain = rounded.forward(IDS), TorchSession(model).forward(IDS)
    session = CpuSession(folder, threads=1)
    actual = [session.forward(IDS[:, start:end]) for start, end in ((0, 60), (60, 61), (61, 90))]
    off = np.abs(np.concatenate(actual, axis=1) - expected).max()
    changed = np.abs(plain - expected).max()
    assert off < changed / 4  # a few codes may differ by one, where a number lies between two


def test_the_record_says_how_the_scales_were_found_and_has_their_hash() -> None:
    folder = shared_rounded_export()
    record = json.loads((folder / "export.json").read_text())
    assert record["cache_format"] == "int8"
    assert record["cache_rounding"]["calibration"]["details"]["file"] == "text"
    assert record["cache_rounding"]["scales_sha256"] == read_rounding(folder).sha256()
    assert record["cache_rounding"]["kl"] < 0.05
    assert "ONNX Runtime >= 1.27" in record["runs_in"]
    assert 0 < record["proof"]["relative_error"] <= record["proof"]["tolerance"]


def test_inspect_shows_the_cache(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(shared_rounded_export()), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["cache_format"] == "int8"
    assert facts["KV cache, bytes a token"] == "128"  # 2 layers, 2 heads of 16, 2 sides
    assert "kl" in facts["cache_rounding"]


def test_a_graph_that_rounds_otherwise_is_not_proven() -> None:
    def by_others(skeleton: Any, request: ExportRequest, folder: Path) -> dict[str, Any]:
        assert request.rounding is not None
        doubled = [(2.5 * keys, values) for keys, values in request.rounding.scales]
        wrong = replace(request, rounding=CacheRounding(tuple(doubled)))
        return _write_graph(skeleton, wrong, "float", folder)[0].record

    wanted = ExportRequest("cpu", max_length=43, cache="int8")  # of no other test
    with pytest.raises(InputError, match="would not compute what the model computes"):
        prove(tiny_llama().config, wanted, by_others)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_windows_and_norms_of_keys_are_proven(family: str) -> None:
    proof = prove_model(
        tiny_model(family).config, ExportRequest("cpu", max_length=40, cache="int8")
    )
    assert proof["relative_error"] <= proof["tolerance"]


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"profile": "opset24", "cache": "int8"}, "--cache"),
        ({"profile": "cpu", "cache": "int4"}, "--cache"),
        ({"profile": "cpu", "calibration": "self"}, "--calibration"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings: dict[str, Any], where: str) -> None:
    with pytest.raises(UsageError) as caught:
        ExportRequest(**settings).check()
    assert caught.value.details["where"] == where


def test_too_short_a_text_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "short").write_text("too short")
    wanted = ExportRequest("cpu", cache="int8", calibration=str(tmp_path / "short"))
    with pytest.raises(InputError, match="too short"):
        export_folder(shared_rounded_export().parent / "model", tmp_path / "onnx", wanted)
    assert not (tmp_path / "onnx").exists()


def test_scales_of_a_float_cache_are_not_there_to_be_read() -> None:
    with pytest.raises(InputError, match="not one of codes"):
        read_rounding(shared_export("cpu"))


def test_scales_are_the_same_each_time() -> None:
    model = tiny_llama()
    ids = torch.from_numpy(IDS)
    assert rounding_of(model, ids, 100).sha256() == rounding_of(model, ids, 100).sha256()
